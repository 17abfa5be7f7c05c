import assert from "node:assert/strict";
import { test } from "node:test";
import { findNode, namesOf } from "../../web/graph.js";
import { Videos } from "../../web/videos.js";

const every = () => () => {};
const FILE = { filename: "a_00001_.mp4", subfolder: "video", type: "output" };

class Storage {
  values = new Map();
  getItem(name) {
    return this.values.get(name) ?? null;
  }
  setItem(name, value) {
    this.values.set(name, value);
  }
}

const chunk = (at, frames, more = {}) => ({ first: 0, at, length: 9, fps: 16, videos: [frames], ...more });

test("files outlive the page, and belong to one node of one workflow", () => {
  const storage = new Storage();
  new Videos(storage, every).finish("a.json", "4", [FILE], { frame_rate: 16 });
  const later = new Videos(storage, every);
  assert.deepEqual(later.find("a.json", "4").files, [FILE]);
  assert.equal(later.find("a.json", "5"), undefined);
  assert.equal(later.find("b.json", "4"), undefined);
});

test("a workflow that is renamed keeps what its nodes have made", () => {
  const videos = new Videos(new Storage(), every);
  videos.finish("a.json", "12:3", [FILE], {});
  videos.of("a.json", "5").receive(chunk(0, ["x"]), 0);
  videos.move("a.json", "b.json");
  assert.deepEqual(videos.find("b.json", "12:3").files, [FILE]);
  assert.equal(videos.find("b.json", "5").player.made, 1);
});

test("a file of another workflow is foreign, an unknown one is not", () => {
  const videos = new Videos(new Storage(), every);
  videos.finish("a.json", "4", [FILE], {});
  assert.ok(videos.isForeign("b.json", { ...FILE }));
  assert.ok(!videos.isForeign("a.json", { ...FILE }));
  assert.ok(!videos.isForeign("b.json", { ...FILE, filename: "other.mp4" }));
});

test("of what was stored long ago nothing is kept", () => {
  const storage = new Storage();
  const videos = new Videos(storage, every);
  for (let i = 0; i < 150; i++) videos.finish("a.json", `n${i}`, [FILE], {});
  videos.finish("a.json", "n60", [FILE], {});
  const later = new Videos(storage, every);
  assert.equal(later.find("a.json", "n0"), undefined);
  assert.ok(later.find("a.json", "n60") && later.find("a.json", "n149"));
});

test("storage that is full, forbidden or broken does no harm", () => {
  const broken = { getItem: () => "{", setItem: () => { throw new Error("full"); } };
  const videos = new Videos(broken, every);
  videos.finish("a.json", "4", [FILE], {});
  assert.deepEqual(videos.find("a.json", "4").files, [FILE]);
});

test("there is no rate before the second chunk", () => {
  const video = new Videos(new Storage(), every).of("a.json", "4");
  video.receive(chunk(0, ["a", "b"]), 1000);
  assert.equal(video.rate, 0);
  video.receive(chunk(2, ["c", "d", "e"]), 2000);
  assert.equal(video.rate, 3);
});

test("frames of a new run take the place of the files of the last one", () => {
  const videos = new Videos(new Storage(), every);
  videos.finish("a.json", "4", [FILE], { seed: "5" });
  const video = videos.find("a.json", "4");
  video.receive(chunk(0, ["a"]), 0);
  assert.deepEqual([video.files, video.facts, video.frames], [[], {}, true]);
  videos.finish("a.json", "4", [FILE], {});
  assert.equal(video.frames, false);
});

test("a batch has a frame of each video at a time", () => {
  const video = new Videos(new Storage(), every).of("a.json", "4");
  video.receive(chunk(0, null, { videos: [["a0", "a1"], ["b0", "b1"]] }), 0);
  assert.equal(video.batch, 2);
  assert.deepEqual(video.player.frames, [["a0", "b0"], ["a1", "b1"]]);
});

test("a run whose beginning was missed begins with what comes next", () => {
  const video = new Videos(new Storage(), every).of("a.json", "4");
  video.receive(chunk(5, ["f", "g"]), 0);
  assert.equal(video.player.first, 5);
  assert.equal(video.player.made, 7);
});

// --- graph.js --------------------------------------------------------------------------------------------------------

class Graph {
  constructor(...nodes) {
    this.nodes = nodes;
  }
  getNodeById(id) {
    return this.nodes.find((node) => String(node.id) === id) ?? null;
  }
}

test("a node is found by its name, in subgraphs too, whatever its id looks like", () => {
  const inner = { id: "stream-a" };
  const between = { id: 7, subgraph: new Graph(inner) };
  const root = new Graph({ id: 3 }, { id: 12, subgraph: new Graph(between) });
  assert.equal(findNode(root, "12:7:stream-a"), inner);
  assert.equal(findNode(root, 3).id, 3);
  assert.equal(findNode(root, "12:8"), undefined);
  assert.equal(findNode(root, "3:1"), undefined);
  assert.equal(findNode(undefined, "3"), undefined);
});

test("a node has a name for each use of its subgraph", () => {
  const inner = { id: 3 };
  const shared = new Graph(inner);
  const root = new Graph({ id: 1, subgraph: shared }, { id: 2, subgraph: shared });
  assert.deepEqual(namesOf(root, inner), ["1:3", "2:3"]);
  assert.deepEqual(namesOf(root, { id: 3 }), []);
});
