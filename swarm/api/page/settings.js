// How answers are asked for, kept in this browser (localStorage), and the dialog in which that is changed.

const KEY = "swarm-settings";
const DEFAULTS = { systemPrompt: "", temperature: 0.7, maxTokens: null, apiKey: "", model: "", routeOpen: null };

/** The settings, with what this browser remembers. */
export function readSettings() {
  try {
    return { ...DEFAULTS, ...JSON.parse(localStorage.getItem(KEY) ?? "{}") };
  } catch {
    return { ...DEFAULTS }; // nothing can be read here, or nonsense
  }
}

/** Change some of them, here and for the next time. */
export function changeSettings(settings, changes) {
  Object.assign(settings, changes);
  try {
    localStorage.setItem(KEY, JSON.stringify(settings));
  } catch {
    return; // a browser that keeps nothing: they hold until the page is closed
  }
}

/** Make the dialog in index.html work; `changed` is called after each change that was saved. */
export function settingsDialog(settings, changed) {
  const dialog = document.getElementById("settings");
  const form = dialog.querySelector("form");
  const { temperature } = form.elements;
  const shown = form.querySelector(".value");
  const showTemperature = () => {
    const value = Number(temperature.value);
    shown.textContent = value === 0 ? "0: always the likeliest word" : value.toFixed(1);
    temperature.setAttribute("aria-valuetext", shown.textContent);
  };
  temperature.addEventListener("input", showTemperature);
  form.addEventListener("submit", () => {
    const { systemPrompt, maxTokens, apiKey } = form.elements;
    changeSettings(settings, {
      systemPrompt: systemPrompt.value,
      temperature: Number(temperature.value),
      maxTokens: maxTokens.value ? Number(maxTokens.value) : null,
      apiKey: apiKey.value.trim(),
    });
    changed();
  });
  for (const button of dialog.querySelectorAll("[data-close]")) button.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside it
  });
  return (field = "systemPrompt") => {
    form.elements.systemPrompt.value = settings.systemPrompt;
    temperature.value = settings.temperature;
    form.elements.maxTokens.value = settings.maxTokens ?? "";
    form.elements.apiKey.value = settings.apiKey;
    showTemperature();
    dialog.showModal();
    form.elements[field].focus();
  };
}
