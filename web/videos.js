/* What the Stream nodes of all open workflows have made, whether their workflow is the one that is shown or not.
 *
 * A node that is seen is thrown away when its workflow is left, or a step is undone, and made anew; what it has made
 * stays here, under the workflow's path and the node's name. Files outlive the page.
 */

import { Player } from "./player.js";

const STORED = "self_forcing.videos";
const MOST_STORED = 100; // entries

/** One video, or a batch of them: its frames while it is made, its files afterwards. */
export class Video {
  constructor(every, files = [], facts = {}) {
    this.player = new Player({ every, show: () => {} });
    this.status = "";
    this.changed = () => {};
    this.frames = false; // whether there are frames of this run
    this.batch = 1;
    this.finish(files, facts);
  }

  /** Frames from the node: { first, at, length, fps, videos: per video of the batch, JPEGs in base64 }. */
  receive(data, now) {
    const [frames] = data.videos;
    if (!this.frames || data.at === data.first || data.at < this.player.made) {
      // Or its beginning never came, as when the page was loaded while it runs: then it begins with what comes next.
      this.player.begin({ ...data, first: data.at });
      Object.assign(this, { frames: true, files: [], facts: {}, batch: data.videos.length, began: now });
      this.counted = -frames.length; // the clock starts when the first chunk is there
    }
    this.player.add(data.at, frames.map((_, i) => data.videos.map((video) => video[i])));
    this.counted += frames.length;
    this.until = now;
    this.changed();
  }

  /** Files that it was written to, and what the node says of them: { frame_rate, frames, seed, stopped }. */
  finish(files, facts) {
    this.files = files;
    this.facts = facts;
    if (files.length) {
      this.batch = files.length;
      this.frames = false;
    }
    this.changed();
  }

  say(status) {
    this.status = status;
    this.changed();
  }

  /** Frames made per second since the first chunk was there; 0 while there is but one. */
  get rate() {
    return this.counted > 0 && this.until > this.began ? (1000 * this.counted) / (this.until - this.began) : 0;
  }
}

export class Videos {
  /** storage: sessionStorage or its like; every: the clock of players */
  constructor(storage, every) {
    this.storage = storage;
    this.every = every;
    this.videos = new Map(); // key -> Video
    this.paths = new Map(); // prompt id -> path of its workflow
    try {
      this.stored = JSON.parse(storage.getItem(STORED)) ?? {};
    } catch {
      this.stored = {};
    }
  }

  /** What that node of that workflow has made; undefined where nothing is known. */
  find(path, name) {
    const key = `${path}#${name}`;
    const stored = this.stored[key];
    if (!this.videos.has(key) && stored) this.videos.set(key, new Video(this.every, stored.files, stored.facts));
    return this.videos.get(key);
  }

  /** The same, made where there is none. */
  of(path, name) {
    const found = this.find(path, name);
    if (found) return found;
    const video = new Video(this.every);
    this.videos.set(`${path}#${name}`, video);
    return video;
  }

  finish(path, name, files, facts) {
    this.of(path, name).finish(files, facts);
    delete this.stored[`${path}#${name}`]; // the newest come last
    this.stored[`${path}#${name}`] = { files, facts };
    this.stored = Object.fromEntries(Object.entries(this.stored).slice(-MOST_STORED));
    this.#store();
  }

  /** A workflow has another name now. */
  move(from, to) {
    const renamed = (key) => key.startsWith(`${from}#`) && to + key.slice(from.length);
    for (const [key, video] of [...this.videos]) if (renamed(key)) this.videos.set(renamed(key), video);
    for (const [key, entry] of Object.entries(this.stored)) if (renamed(key)) this.stored[renamed(key)] = entry;
    this.#store();
  }

  /** Whether a file was made in another workflow than that: ComfyUI gives outputs to whatever workflow is shown. */
  isForeign(path, file) {
    const same = (other) => other.filename === file.filename && other.subfolder === file.subfolder;
    const owners = Object.keys(this.stored).filter((key) => this.stored[key].files.some(same));
    return owners.length > 0 && !owners.some((key) => key.startsWith(`${path}#`));
  }

  #store() {
    try {
      this.storage.setItem(STORED, JSON.stringify(this.stored));
    } catch {} // full, or forbidden: then it lasts as long as the page
  }
}
