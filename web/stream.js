/* The screen of Self Forcing Stream: plays the frames that the node sends while it runs. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { Player } from "./player.js";

const NODE = "SelfForcingStream";
const EVENT = "self_forcing.frames";
const screens = new Map(); // node -> Screen

/** The screen of the node that an event is about. In a subgraph the server says the ids of all nodes around it: 12:3. */
function screenOf(id) {
  let node;
  let graph = app.rootGraph;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return screens.get(node);
}

/** Ends the screens of nodes that are in no graph any more. A graph that is loaded anew drops them without a word. */
function forget() {
  const graphs = [app.rootGraph, ...app.rootGraph.subgraphs.values()];
  const there = new Set(graphs.flatMap((graph) => graph.nodes));
  for (const [node, screen] of screens)
    if (!there.has(node)) {
      screen.player.stop?.();
      screens.delete(node);
    }
}

class Screen {
  constructor() {
    this.element = document.createElement("div");
    this.element.style.cssText = "position:relative;width:100%;height:100%;min-height:160px;background:#111;overflow:hidden";
    this.canvas = document.createElement("canvas");
    this.canvas.style.cssText = "width:100%;height:100%;object-fit:contain;image-rendering:auto;cursor:pointer";
    this.canvas.title = "Click to pause and to go on";
    this.label = document.createElement("div");
    this.label.style.cssText =
      "position:absolute;left:0;bottom:0;padding:2px 6px;font:11px sans-serif;color:#ddd;background:#0008;pointer-events:none";
    this.element.append(this.canvas, this.label);
    this.label.textContent = "The video plays here while it is made.";
    this.canvas.addEventListener("click", () => (this.player.paused = !this.player.paused));
    this.player = new Player({
      show: (frame, number) => this.show(frame, number),
      every: (ms, tick) => {
        const timer = setInterval(tick, ms);
        return () => clearInterval(timer);
      },
    });
  }

  /** What the node has sent: { first, at, length, fps, frames: JPEGs in base64 }. */
  receive(data) {
    if (data.at === data.first || this.player.length === undefined || data.at < this.player.made) {
      // Or its beginning never came, as when the page was loaded while it runs: then it begins with what comes next.
      this.player.begin({ ...data, first: data.at });
      this.began = this.until = performance.now();
      this.counted = -data.frames.length; // the clock starts when the first chunk is there
    }
    this.player.add(data.at, data.frames);
    this.counted += data.frames.length;
    this.until = performance.now();
  }

  async show(frame, number) {
    const picture = new Image();
    picture.src = `data:image/jpeg;base64,${frame}`;
    this.newest = picture;
    await picture.decode();
    if (this.newest !== picture) return; // a later frame was quicker
    if (this.canvas.width !== picture.width || this.canvas.height !== picture.height) {
      Object.assign(this.canvas, { width: picture.width, height: picture.height });
      this.canvas.style.imageRendering = picture.width < 256 ? "pixelated" : "auto";
    }
    this.canvas.getContext("2d").drawImage(picture, 0, 0);
    this.label.textContent = `frame ${number + 1} of ${this.player.length}, ${this.player.made} made${this.rate()}`;
  }

  /** Frames made per second since the first chunk was there. */
  rate() {
    const seconds = (this.until - this.began) / 1000;
    return seconds > 0 ? `, ${(this.counted / seconds).toFixed(1)} per second` : "";
  }
}

api.addEventListener(EVENT, ({ detail }) => screenOf(detail.node)?.receive(detail));
api.addEventListener("execution_start", forget);
for (const over of ["execution_success", "execution_error", "execution_interrupted"])
  api.addEventListener(over, () => screens.forEach((screen) => screen.player.end()));

app.registerExtension({
  name: "SelfForcing.Stream",
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const screen = new Screen();
    const widget = node.addDOMWidget("screen", "self_forcing_screen", screen.element, {
      serialize: false,
      getMinHeight: () => 180,
    });
    widget.serialize = false;
    screens.set(node, screen);
    const { onRemoved } = node;
    node.onRemoved = function (...args) {
      screen.player.stop?.();
      screens.delete(node);
      return onRemoved?.apply(this, args);
    };
  },
});
