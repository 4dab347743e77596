const choose = (target) => {
  element.querySelectorAll("[aria-pressed]").forEach((other) => other.removeAttribute("aria-pressed"));
  target.setAttribute("aria-pressed", "true");
  trigger("select", { token: Number(target.dataset.token) });
};
element.addEventListener("click", (event) => {
  const target = event.target.closest("[data-token]");
  if (target) choose(target);
});
element.addEventListener("keydown", (event) => {
  const target = event.target.closest("[data-token]");
  if (!target) return;
  const to = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  if (to && target[to]) {
    target.tabIndex = -1;
    target[to].tabIndex = 0;
    target[to].focus();
  } else if (event.key === "Enter" || event.key === " ") {
    choose(target);
  } else if (!to) {
    return;
  }
  event.preventDefault();
});
