// The first two pictures of a strip, one over the other, with a slider between them. Without scripts both stand there.
for (const strip of document.querySelectorAll("[data-compare]")) {
  const [before, after] = strip.querySelectorAll("li");
  if (!after) continue;
  const image = after.querySelector("img");
  const over = document.createElement("div");
  over.className = "over";
  const under = before.querySelector("img");
  under.before(over);
  over.append(under, image);
  const slider = document.createElement("input");
  slider.type = "range";
  slider.value = 50;
  const caption = after.querySelector("figcaption").textContent;
  slider.setAttribute("aria-label", `From before to after: ${caption}`);
  const show = () => { image.style.clipPath = `inset(0 0 0 ${slider.value}%)`; };
  slider.addEventListener("input", show);
  over.after(slider);
  before.querySelector("figcaption").textContent = `before | ${caption}`;
  after.remove();
  show();
}
