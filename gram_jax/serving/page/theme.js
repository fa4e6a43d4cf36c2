// Light, dark, or as the system is set. Runs before the page is drawn, so that it does not flash.

(() => {
  const CHOICES = ["auto", "light", "dark"];
  const root = document.documentElement;

  function stored() {
    try {
      const choice = localStorage.getItem("theme");
      return CHOICES.includes(choice) ? choice : "auto";
    } catch (error) {
      if (error instanceof DOMException) return "auto"; // storage is switched off
      throw error;
    }
  }

  function store(choice) {
    try {
      localStorage.setItem("theme", choice);
    } catch (error) {
      if (!(error instanceof DOMException)) throw error; // then it holds for this visit only
    }
  }

  root.dataset.theme = stored();
  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => (button.textContent = `Theme: ${root.dataset.theme}`);
    button.addEventListener("click", () => {
      const next = CHOICES[(CHOICES.indexOf(root.dataset.theme) + 1) % CHOICES.length];
      root.dataset.theme = next;
      store(next);
      show();
    });
    show();
  });
})();
