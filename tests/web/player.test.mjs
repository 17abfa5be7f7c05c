import assert from "node:assert/strict";
import { test } from "node:test";
import { Player } from "../../web/player.js";

function setUp(video = {}) {
  const shown = [];
  const timers = { running: 0 };
  const player = new Player({
    show: (frame, number) => shown.push([frame, number]),
    every: (ms) => {
      timers.running += 1;
      timers.ms = ms;
      return () => (timers.running -= 1);
    },
  });
  player.begin({ first: 0, length: 6, fps: 16, ...video });
  player.seen = true;
  const tick = (times) => {
    for (let i = 0; i < times; i++) player.tick();
  };
  return { player, shown, timers, tick };
}

test("frames come one at a tick, in order, at the rate asked for", () => {
  const { player, shown, timers, tick } = setUp();
  player.add(0, ["a", "b"]);
  tick(1);
  player.add(2, ["c"]);
  tick(2);
  assert.deepEqual(shown, [["a", 0], ["b", 1], ["c", 2]]);
  assert.equal(timers.ms, 62.5);
});

test("the last frame stays until the next chunk is there", () => {
  const { player, shown, tick } = setUp();
  player.add(0, ["a"]);
  tick(5);
  assert.equal(shown.length, 1);
  player.add(1, ["b"]);
  tick(1);
  assert.deepEqual(shown.at(-1), ["b", 1]);
});

test("a whole video plays again from its beginning", () => {
  const { player, shown, tick } = setUp({ length: 2 });
  player.add(0, ["a", "b"]);
  tick(4);
  assert.deepEqual(shown.map(([frame]) => frame), ["a", "b", "a", "b"]);
});

test("so does what there is of a cancelled one", () => {
  const { player, shown, tick } = setUp();
  player.add(0, ["a", "b"]);
  player.end();
  tick(3);
  assert.deepEqual(shown.map(([frame]) => frame), ["a", "b", "a"]);
});

test("a new video takes the place of the old one, with one clock", () => {
  const { player, shown, timers, tick } = setUp();
  player.add(0, ["a"]);
  player.begin({ first: 5, length: 9, fps: 8 });
  player.add(5, ["x"]);
  tick(1);
  assert.deepEqual(shown, [["x", 5]]);
  assert.equal(timers.running, 1);
});

test("of a very long video only the end is kept", () => {
  const { player, shown, tick } = setUp({ length: 1e6 });
  for (let at = 0; at < 10_000; at += 100) player.add(at, Array.from({ length: 100 }, (_, i) => at + i));
  tick(1);
  assert.equal(player.made, 10_000);
  assert.ok(player.frames.length <= 960);
  assert.equal(shown[0][0], shown[0][1]);
});

test("paused, nothing moves", () => {
  const { player, shown, tick } = setUp();
  player.add(0, ["a", "b"]);
  player.paused = true;
  tick(3);
  player.paused = false;
  tick(1);
  assert.deepEqual(shown, [["a", 0]]);
});

test("frames that never came leave their time, and the numbers of the others", () => {
  const { player, shown, tick } = setUp();
  player.add(0, ["a"]);
  player.add(3, ["d"]);
  tick(4);
  assert.deepEqual(shown, [["a", 0], ["a", 1], ["a", 2], ["d", 3]]);
});

test("out of sight, or paused, the clock stands still", () => {
  const { player, timers } = setUp();
  player.seen = false;
  assert.equal(timers.running, 0);
  player.paused = true;
  player.seen = true;
  assert.equal(timers.running, 0);
  player.paused = false;
  assert.equal(timers.running, 1);
});

test("speed changes the rate, of the next video too", () => {
  const { player, timers } = setUp();
  player.speed = 2;
  assert.equal(timers.ms, 31.25);
  player.begin({ first: 0, length: 6, fps: 8 });
  assert.equal(timers.ms, 62.5);
  assert.equal(timers.running, 1);
});

test("a time shows its frame, or the nearest that is there, also while paused", () => {
  const { player, shown } = setUp({ first: 2, length: 18 });
  player.time = 0.5; // nothing is there yet
  player.add(2, ["c", "d", "e", "f"]);
  player.paused = true;
  player.time = 1 / 16;
  assert.equal(player.time, 1 / 16);
  player.time = 9;
  player.time = -1;
  assert.deepEqual(shown, [["d", 3], ["f", 5], ["c", 2]]);
  assert.equal(player.duration, 1);
});
