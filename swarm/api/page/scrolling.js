// Keeps the end of a growing conversation in sight, unless the reader has scrolled away from it.

const NEAR_PX = 60;

/** follow(): stay at the end if the reader is there; jump(): go there in any case. */
export function followEnd(scroller, button) {
  let following = true;
  const distance = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
  const jump = () => {
    scroller.scrollTop = scroller.scrollHeight;
    following = true;
    button.hidden = true;
  };
  scroller.addEventListener("scroll", () => {
    following = distance() < NEAR_PX;
    button.hidden = following;
  }, { passive: true });
  button.addEventListener("click", jump);
  new ResizeObserver(() => following && jump()).observe(scroller);
  return { jump, follow: () => following && jump() };
}
