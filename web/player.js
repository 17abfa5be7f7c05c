/* Plays frames that arrive in bursts at an even rate: a chunk's worth at once, shown one after the other.
 *
 *     const player = new Player({ show: (frame, number) => ..., every: (ms, f) => stop });
 *     player.begin({ first, length, fps });      a new video
 *     player.add(at, frames);                    frames at .. at + frames.length - 1
 *
 * Where frames come slower than they are shown, the last one stays; once all are there, or the run has ended, it plays
 * again from the oldest that is kept.
 */

const KEPT = 960; // frames: a minute at 16 a second, some tens of MB as JPEGs

export class Player {
  constructor({ show, every }) {
    this.show = show;
    this.every = every;
    this.frames = [];
    this.stop = null;
  }

  /** A new video of frames first .. length - 1, to be shown at `fps`. */
  begin({ first, length, fps }) {
    this.stop?.();
    Object.assign(this, { frames: [], oldest: first, next: first, length, ended: false, paused: false });
    this.stop = this.every(1000 / fps, () => this.tick());
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

  tick() {
    if (this.paused || !this.frames.length) return;
    if (this.next >= this.made) {
      if (!this.ended) return; // wait for the next chunk
      this.next = this.oldest;
    }
    this.show(this.frames[this.next - this.oldest], this.next);
    this.next += 1;
  }
}
