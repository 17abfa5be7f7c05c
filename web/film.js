/* A video file behind the same handles as a Player: paused, speed, seen, time, duration. */

export class Film {
  #paused = false;
  #seen = false;

  constructor(url) {
    this.element = Object.assign(document.createElement("video"), {
      src: url, loop: true, muted: true, playsInline: true, preload: "auto", tabIndex: -1,
    });
  }

  /** Lets go of the file, and of the decoder. */
  close() {
    this.element.removeAttribute("src");
    this.element.load();
    this.element.remove();
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
    return this.element.playbackRate;
  }

  set speed(speed) {
    this.element.playbackRate = this.element.defaultPlaybackRate = speed;
  }

  get duration() {
    return this.element.duration || 0;
  }

  get time() {
    return this.element.currentTime;
  }

  set time(seconds) {
    this.element.currentTime = Math.min(Math.max(seconds, 0), this.duration);
  }

  #run() {
    if (this.#seen && !this.#paused) this.element.play().catch(() => {}); // it has been stopped again, or closed
    else this.element.pause();
  }
}
