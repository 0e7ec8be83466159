// The list of chats on narrow screens: it lies over the conversation, and everything else waits.

/** close(): returns whether it was open. */
export function sidePanel(side, scrim, openButton, closeButton) {
  const narrow = matchMedia("(max-width: 52rem)");
  const main = document.querySelector("main");

  const set = (open) => {
    const over = narrow.matches && open;
    side.classList.toggle("open", over);
    side.inert = narrow.matches && !open;
    main.inert = over;
    scrim.hidden = !over;
    openButton.setAttribute("aria-expanded", String(over));
  };
  const close = () => {
    if (!side.classList.contains("open")) return false;
    set(false);
    openButton.focus();
    return true;
  };
  openButton.addEventListener("click", () => {
    set(true);
    closeButton.focus();
  });
  closeButton.addEventListener("click", close);
  scrim.addEventListener("click", close);
  narrow.addEventListener("change", () => set(false));
  set(false);
  return { close };
}
