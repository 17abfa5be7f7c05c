/* Plays frames that arrive in bursts at an even rate: a chunk's worth at once, shown one after the other.
 *
 *     const player = new Player({ show: (frame, number) => ..., every: (ms, f) => stop });
 *     player.begin({ first, length, fps });      a new video
 *     player.add(at, frames);                    frames at .. at + frames.length - 1
 *     player.seen = true;                        the clock runs while the video is seen and not paused
 *
 * Where frames come slower than they are shown, the last one stays; once all are there, or the run has ended, it plays
 * again from the oldest that is kept. Times are in seconds since the first frame.
 */

const KEPT = 960; // frames: a minute at 16 a second, some tens of MB as JPEGs

export class Player {
  #paused = false;
  #seen = false;
  #speed = 1;

  constructor({ show, every }) {
    this.show = show;
    this.every = every;
    this.frames = [];
    this.stop = null;
  }

  /** A new video of frames first .. length - 1, to be shown at `fps`. */
  begin({ first, length, fps }) {
    Object.assign(this, { frames: [], first, oldest: first, next: first, length, fps, ended: false });
    this.paused = false;
  }

  /** Frames that have just been made, from number `at` on. Where some before never came, the last one stands in. */
  add(at, frames) {
    while (this.made < at) this.frames.push(this.frames.at(-1) ?? frames[0]);
    this.frames.push(...frames);
    const dropped = Math.max(0, this.frames.length - KEPT);
    this.frames.splice(0, dropped);
    this.oldest += dropped;
    this.next = Math.max(this.next, this.oldest);
    this.ended ||= at + frames.length >= this.length;
  }

  /** Nothing more will come: the run is over, whole or not. */
  end() {
    this.ended = true;
  }

  get made() {
    return this.oldest + this.frames.length;
  }

  get paused() {
    return this.#paused;
  }

  set paused(paused) {
    this.#paused = paused;
    this.#run();
  }

  set seen(seen) {
    this.#seen = seen;
    this.#run();
  }

  get speed() {
    return this.#speed;
  }

  set speed(speed) {
    this.#speed = speed;
    this.#run();
  }

  get duration() {
    return (this.length - this.first) / this.fps;
  }

  get time() {
    return (Math.max(this.next - 1, this.first) - this.first) / this.fps;
  }

  /** Shows the frame of that time, or the nearest that is there. */
  set time(seconds) {
    if (!this.frames.length) return;
    const number = this.first + Math.round(seconds * this.fps);
    this.next = Math.min(Math.max(number, this.oldest), this.made - 1);
    this.#showNext();
  }

  #run() {
    this.stop?.();
    this.stop = null;
    if (this.#seen && !this.#paused && this.fps) {
      this.stop = this.every(1000 / (this.fps * this.#speed), () => this.tick());
    }
  }

  tick() {
    if (this.paused || !this.frames.length) return;
    if (this.next >= this.made) {
      if (!this.ended) return; // wait for the next chunk
      this.next = this.oldest;
    }
    this.#showNext();
  }

  #showNext() {
    this.show(this.frames[this.next - this.oldest], this.next);
    this.next += 1;
  }
}
