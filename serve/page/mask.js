/** Brush geometry for masks, and a mask's PNG. Sizes are the picture's pixels. */

/** Points from `from` to `to`, at most `spacing` apart, without `from`. The last is exactly `to`. */
export function between(from, to, spacing) {
  const distance = Math.hypot(to.x - from.x, to.y - from.y);
  const count = Math.max(1, Math.ceil(distance / spacing));
  const inner = Array.from({ length: count - 1 }, (_, i) => ({
    x: from.x + ((to.x - from.x) * (i + 1)) / count,
    y: from.y + ((to.y - from.y) * (i + 1)) / count,
  }));
  return [...inner, to];
}

/** Strokes `{size, erase, points}` with a line of a brush `{size, erase}`: it continues a stroke of that brush that ends at
 * `from`, or begins one. */
export function withLine(strokes, from, to, { size, erase }) {
  const last = strokes.at(-1);
  const end = last?.points.at(-1);
  const continues = last?.size === size && last.erase === erase && end.x === from.x && end.y === from.y;
  const points = [...(continues ? last.points : [from]), ...between(from, to, Math.max(0.5, size / 6))];
  return [...(continues ? strokes.slice(0, -1) : strokes), { size, erase, points }];
}

/** A pointer's place on the screen as a place in the picture. */
export function picturePoint(clientX, clientY, box, width, height) {
  return { x: ((clientX - box.left) / box.width) * width, y: ((clientY - box.top) / box.height) * height };
}

/** Draws strokes `{size, erase, points}` onto a 2D context, opaque where the picture is to be repainted. */
export function paint(context, strokes, color) {
  context.clearRect(0, 0, context.canvas.width, context.canvas.height);
  for (const { size, erase, points } of strokes) {
    context.globalCompositeOperation = erase ? "destination-out" : "source-over";
    context.fillStyle = color;
    for (const { x, y } of points) {
      context.beginPath();
      context.arc(x, y, size / 2, 0, 2 * Math.PI);
      context.fill();
    }
  }
  context.globalCompositeOperation = "source-over";
}

/** RGBA pixels as the images API wants a mask: black, transparent where `painted` (RGBA) is at least half opaque. */
export function maskPixels(painted) {
  const pixels = new Uint8ClampedArray(painted.length);
  let any = false;
  for (let i = 3; i < painted.length; i += 4) {
    const repaint = painted[i] >= 128;
    pixels[i] = repaint ? 0 : 255;
    any ||= repaint;
  }
  return any ? pixels : null;
}
