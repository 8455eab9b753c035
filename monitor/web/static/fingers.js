// Fingers on a chart: two zoom it, one moves what is zoomed or reads the curve; a finger that goes up or down scrolls the page.
// What lies under a finger stays under it. Two quick taps show the whole again.

const TAP_MS = 300, TAP_PX = 10;
const CLOSEST = 0.02; // of the width: fingers that meet would zoom without end

/**
 * over           the element that is touched
 * chart.range()  what is in view, [low, high] on an even scale; chart.zoomed() whether that is less than the whole
 * chart.show(low, high), chart.whole()   put another range in view; chart.read(share) the curve at a share of the width
 */
export function listen(over, chart) {
  const down = new Map(); // where each finger is, as a share of the width, oldest first
  let grip = null; // the values that lay under the fingers when the last of them came or went
  let tap = null, before = -Infinity;
  over.style.touchAction = "pan-y";

  const share = (event) => {
    const box = over.getBoundingClientRect();
    return (event.clientX - box.left) / (box.width || 1);
  };
  const hold = () => {
    const range = chart.range();
    const places = [...down.values()].slice(0, 2);
    grip = range && places.map((at) => range[0] + at * (range[1] - range[0]));
  };

  over.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "touch") return;
    over.setPointerCapture(event.pointerId);
    down.set(event.pointerId, share(event));
    tap = down.size === 1 ? { x: event.clientX, y: event.clientY, at: event.timeStamp } : null;
    hold();
  });

  over.addEventListener("pointermove", (event) => {
    if (!down.has(event.pointerId)) return;
    down.set(event.pointerId, share(event));
    if (tap && Math.hypot(event.clientX - tap.x, event.clientY - tap.y) > TAP_PX) tap = null;
    const range = chart.range();
    if (!grip || !range) return;
    const [one, two] = down.values();
    if (two !== undefined) {
      const apart = two - one;
      if (Math.abs(apart) < CLOSEST || (apart > 0) !== (grip[1] > grip[0])) return;
      const span = (grip[1] - grip[0]) / apart;
      chart.show(grip[0] - one * span, grip[0] + (1 - one) * span);
    } else if (chart.zoomed()) {
      const span = range[1] - range[0];
      chart.show(grip[0] - one * span, grip[0] + (1 - one) * span);
    } else chart.read(one);
  });

  const up = (event) => {
    if (!down.delete(event.pointerId)) return;
    if (tap && event.type === "pointerup" && event.timeStamp - tap.at < TAP_MS) {
      if (event.timeStamp - before < 2 * TAP_MS) chart.whole();
      else chart.read(share(event));
      before = event.timeStamp;
    }
    tap = null;
    hold();
  };
  over.addEventListener("pointerup", up);
  over.addEventListener("pointercancel", up);
}
