// Draws the value of `moh.explore.parts.heads` with `headMap` of the page of heads.
const draw = () => {
  const { title = "", layers = [], values, top, what, chosen } = props.value ?? {};
  element.querySelector("h3").textContent = title;
  const box = element.querySelector(".moh-map");
  box.replaceChildren();
  if (!layers.length) return;
  const shade = (chosen) => map.shade(values, { tops: values.map(() => top), legend: top.toPrecision(2), what, chosen });
  const choose = (layer, head) => {
    shade([layer, head]);
    trigger("select", { layer, head });
  };
  const map = headMap(box, layers, props.choosable ? choose : null);
  shade(chosen);
};
watch("value", draw);
draw();
