// In every frame: what sticks out, what is cut, texts of drawings out of their frame or over another, faint colours.
function luminance(colour) {
  const part = (v) => (v <= 10 ? v / 3294 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const [r, g, b] = colour.map(part);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(one, other) {
  const [x, y] = [luminance(one), luminance(other)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05);
}
function parsed(colour) {
  const numbers = (colour.match(/[\d.]+/g) || []).map(Number);
  return numbers.length >= 3 && numbers[3] !== 0 ? numbers.slice(0, 3) : null;
}
function ground(view, node) {
  for (let place = node; place; place = place.parentElement) {
    const colour = parsed(view.getComputedStyle(place).backgroundColor);
    if (colour) return colour;
  }
  return [255, 255, 255];
}
function inElements(view, root, say) {
  for (const e of root.ownerDocument.body.querySelectorAll("*")) {
    const style = view.getComputedStyle(e), box = e.getBoundingClientRect(), svg = e.closest("svg");
    if (!box.width || box.right < 0) continue;
    if (box.right > root.clientWidth + 1) say("sticks out", e, Math.round(box.right));
    if (!svg && e.scrollWidth > e.clientWidth + 1 && style.display !== "inline") say("cut", e, e.scrollWidth);
    const written = e.tagName !== "title" && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const drawn = ["rect", "circle", "polyline", "path"].includes(e.tagName);
    const ink = parsed(svg ? (style.fill === "none" ? style.stroke : style.fill) : style.color);
    if (ink && (written || drawn)) {
      const ratio = contrast(ink, ground(view, svg || e));
      if (ratio < (drawn ? 3 : 4.5)) say("faint", e, ratio.toFixed(1));
    }
  }
}
function inDrawings(doc, say) {
  for (const svg of doc.querySelectorAll("svg")) {
    const [x, y, w, h] = svg.getAttribute("viewBox").split(" ").map(Number);
    if ((svg.getBoundingClientRect().width / w) * 16 < 11) say("small letters", svg, "");
    const texts = [...svg.querySelectorAll("text")].map((e) => [e, e.getBBox()]);
    texts.forEach(([e, b], place) => {
      const [right, bottom] = [b.x + b.width, b.y + b.height];
      if (b.x < x - 0.5 || b.y < y - 0.5 || right > x + w + 0.5 || bottom > y + h + 0.5) say("out of its frame", e, "");
      for (const [other, c] of texts.slice(place + 1)) {
        const across = b.x < c.x + c.width && c.x < right, down = b.y + 3 < c.y + c.height && c.y + 3 < bottom;
        if (across && down) say("over another", e, other.textContent);
      }
    });
  }
}
function problems(frame) {
  const view = frame.contentWindow, root = frame.contentDocument.documentElement, found = [];
  const say = (what, e, more) => {
    const text = (e.textContent || "").trim().slice(0, 40);
    found.push(`${what}: ${e.tagName} "${text}" ${more}`);
  };
  if (root.scrollWidth > root.clientWidth) found.push(`the page is ${root.scrollWidth} wide in ${root.clientWidth}`);
  inElements(view, root, say);
  inDrawings(frame.contentDocument, say);
  const seen = ground(view, frame.contentDocument.body);
  return { found: [...new Set(found)].slice(0, 20), ground: seen, height: root.scrollHeight };
}
window.onload = () => {
  const report = {};
  for (const frame of document.querySelectorAll("iframe")) report[frame.id] = problems(frame);
  document.getElementById("report").textContent = JSON.stringify(report);
};
