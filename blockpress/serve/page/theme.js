// The theme that was chosen here before; runs before the first paint, so that nothing flashes.
const chosen = localStorage.getItem("blockpress.theme");
if (chosen) document.documentElement.dataset.theme = chosen;
