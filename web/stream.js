/* Ties Self Forcing Stream's screens, and the notes of all nodes, to ComfyUI: its events, its graph, its workflows. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { findNode, mount, namesOf } from "./graph.js";
import { showNotes } from "./notes.js";
import { Screen } from "./screen.js";
import { Videos } from "./videos.js";

const NODE = "SelfForcingStream";
const screens = new Map(); // node -> Screen
const notes = new Map(); // "path#name" -> text
let loading = false; // whether the graph that is shown does not belong to the workflow that is active

const every = (ms, tick) => {
  const timer = setInterval(tick, ms);
  return () => clearInterval(timer);
};
const videos = new Videos(sessionStorage, every);

// --- Workflows -------------------------------------------------------------------------------------------------------

const workflows = () => app.extensionManager?.workflow;
const activePath = () => workflows()?.activeWorkflow?.path ?? "";

/** The path of the workflow that a prompt was queued from; of one that was queued before the page was loaded: this. */
function pathOf(promptId) {
  if (!videos.paths.has(promptId)) videos.paths.set(promptId, queueing ?? activePath());
  return videos.paths.get(promptId);
}

let queueing; // the path of a prompt that has no id yet
const { queuePrompt } = api;
api.queuePrompt = async function (...args) {
  queueing = activePath();
  try {
    const queued = await queuePrompt.apply(this, args);
    if (queued?.prompt_id) videos.paths.set(queued.prompt_id, queueing);
    return queued;
  } finally {
    queueing = undefined;
  }
};

/** The nodes of this page with that name, if that workflow is the one that is shown. */
function nodeIn(path, name) {
  return !loading && path === activePath() ? findNode(app.rootGraph, name) : undefined;
}

/** Gives each screen what its node has made. */
function refresh() {
  if (loading) return;
  const path = activePath();
  for (const [node, screen] of screens) {
    const names = namesOf(app.rootGraph, node);
    if (!names.length) continue; // thrown away, or not there yet
    mount(screen.element, names[0]);
    const made = names.map((name) => videos.find(path, name)).filter(Boolean);
    screen.watch(made.find((video) => video.frames) ?? made[0] ?? null);
  }
  for (const [key, text] of notes) {
    const at = key.lastIndexOf("#");
    const node = key.slice(0, at) === path && findNode(app.rootGraph, key.slice(at + 1));
    if (node) showNotes(node, key.slice(at + 1), text);
  }
}

/** Ends the screens of nodes that are in no graph any more. A graph that is loaded anew drops them without a word. */
function forget() {
  for (const [node, screen] of screens)
    if (!namesOf(app.rootGraph, node).length) {
      screen.close();
      screens.delete(node);
    }
}

function loaded() {
  loading = false;
  forget();
  refresh();
}

/** Calls back when a workflow was opened, saved or renamed. */
function follow() {
  workflows()?.$onAction?.(({ name, after }) => {
    const [before, node] = [activePath(), [...screens.keys()][0]];
    after(() => {
      if (name === "openWorkflow") loaded();
      else if (/^(save|rename)/.test(name) && before !== activePath() && screens.has(node)) {
        videos.move(before, activePath());
        refresh();
      }
    });
  });
}

// --- Events ----------------------------------------------------------------------------------------------------------

/** Calls back with the Video that an event is about, and its screen, if that is there. */
function on(event, act) {
  api.addEventListener(event, ({ detail }) => {
    const path = pathOf(detail.prompt_id);
    act(videos.of(path, detail.node), detail);
    refresh();
  });
}

on("self_forcing.frames", (video, detail) => video.receive(detail, performance.now()));
on("self_forcing.status", (video, detail) => video.say(detail.text));

api.addEventListener("self_forcing.note", ({ detail }) => {
  const path = pathOf(detail.prompt_id);
  notes.set(`${path}#${detail.node}`, detail.text);
  const node = nodeIn(path, detail.node);
  if (node) showNotes(node, detail.node, detail.text);
});

api.addEventListener("executed", ({ detail }) => {
  const [facts] = detail.output?.self_forcing ?? [];
  if (!facts) return;
  videos.finish(pathOf(detail.prompt_id), detail.display_node ?? detail.node, detail.output.video, facts);
  refresh();
});

/** What is being done before the Stream nodes of that prompt begin, in a word. */
api.addEventListener("progress_state", ({ detail }) => {
  const path = pathOf(detail.prompt_id);
  if (loading || path !== activePath()) return;
  const running = Object.values(detail.nodes).find(({ state }) => state === "running");
  const node = running && findNode(app.rootGraph, running.display_node_id ?? running.node_id);
  if (!node || node.comfyClass === NODE) return;
  for (const other of screens.keys())
    for (const name of namesOf(app.rootGraph, other))
      if (detail.nodes[name] === undefined) videos.of(path, name).say(phase(node));
  refresh();
});

/** What a node does, by what it gives. */
function phase(node) {
  const gives = (type) => node.outputs?.some((output) => output.type === type);
  if (gives("CONDITIONING")) return "text";
  if (gives("MODEL") || gives("VAE") || gives("CLIP")) return "loading";
  return node.title;
}

for (const over of ["execution_success", "execution_error", "execution_interrupted"])
  api.addEventListener(over, ({ detail }) => {
    const path = `${pathOf(detail.prompt_id)}#`;
    for (const [key, video] of videos.videos)
      if (key.startsWith(path)) {
        video.player.end();
        video.say("");
      }
  });

// --- The graph -------------------------------------------------------------------------------------------------------

/** Gives what a screen would keep to itself to the graph's canvas: zooming and panning go on over it. */
function forward(event) {
  const canvas = app.canvas?.canvas;
  const pans = event.button === 1 || event.buttons & 4 || (app.canvas?.read_only && event.buttons & 1);
  if (!canvas || (event.type !== "wheel" && !pans)) return;
  event.preventDefault();
  event.stopPropagation();
  canvas.dispatchEvent(new event.constructor(event.type, event));
}

const urlOf = ({ filename, subfolder, type }) =>
  api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);

app.registerExtension({
  name: "SelfForcing.Stream",
  setup: follow,
  beforeConfigureGraph() {
    loading = true;
  },

  /** Outputs that ComfyUI has brought back, with a workflow from its history. */
  onNodeOutputsUpdated(outputs) {
    for (const [name, output] of Object.entries(outputs)) {
      const [facts] = output?.self_forcing ?? [];
      const path = activePath();
      if (facts && !videos.find(path, name)?.files.length && !videos.isForeign(path, output.video[0]))
        videos.finish(path, name, output.video, facts);
    }
    refresh();
  },

  getNodeMenuItems(node) {
    const screen = screens.get(node);
    if (!screen?.source) return [];
    const url = screen.fileUrl;
    const file = url ? [
      { content: "Open Video", callback: () => window.open(url) },
      { content: "Save Video", callback: () => screen.saveVideo() },
    ] : [];
    return [null, ...file, { content: "Save Frame", callback: () => screen.saveFrame() }];
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const screen = new Screen({ urlOf, forward });
    // "preview": ComfyUI then shows it on the outside of a subgraph, too.
    const widget = node.addDOMWidget("screen", "preview", screen.element, {
      serialize: false, hideOnZoom: false, hideInPanel: true, getMinHeight: () => 200,
    });
    widget.serialize = false;
    screens.set(node, screen);
    const { onRemoved } = node;
    node.onRemoved = function (...args) {
      screen.close();
      screens.delete(node);
      return onRemoved?.apply(this, args);
    };
  },
});
