// The theme searches in a worker, which browsers refuse to pages opened from disk: there an invisible frame takes its place.
if (location.protocol === 'file:') window.Worker = class extends EventTarget {
  constructor(url) {
    super()
    const frame = document.body.appendChild(Object.assign(document.createElement('iframe'), {hidden: true})), inside = frame.contentWindow, page = inside.document
    addEventListener('message', e => {
      if (e.source !== inside) return
      const said = new MessageEvent('message', {data: e.data})
      this.dispatchEvent(said)
      if (this.onmessage) this.onmessage(said)
    })
    page.open()
    page.write(`<script>postMessage = said => parent.postMessage(said, '*')</` + `script><script src="${url}"></` + `script>`)
    page.close()
    this.inside = inside
    this.ready = new Promise(done => inside.addEventListener('load', done))
  }
  postMessage(data) { this.ready.then(() => this.inside.dispatchEvent(new MessageEvent('message', {data: structuredClone(data)}))) }
  terminate() { this.ready = new Promise(() => {}) }
}
