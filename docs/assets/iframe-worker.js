// Browsers start no worker for a page that is read from a folder (file://), and without one there
// is no search. There the search runs in a hidden frame, which talks to the page as a worker would.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.inside.postMessage = (data) => this.tell(this, data);
      this.inside.importScripts = (...urls) =>
        Promise.all(urls.map((each) => this.load(new URL(each, url))));
      this.ready = this.load(url);
    }

    load(url) {
      return new Promise((done, failed) => {
        const script = this.inside.document.createElement("script");
        script.src = url;
        script.onload = done;
        script.onerror = failed;
        this.inside.document.body.append(script);
      });
    }

    // Later, as messages come, so that nobody waits for an answer.
    tell(target, data) {
      setTimeout(() => {
        const message = new MessageEvent("message", { data });
        target.dispatchEvent(message);
        if (target.onmessage) target.onmessage(message);
      });
    }

    postMessage(data) {
      this.ready.then(() => {
        const message = new MessageEvent("message", { data });
        this.inside.dispatchEvent(message);
      });
    }

    terminate() {}
  };
}
