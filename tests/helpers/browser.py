"""A headless Chromium, driven through its DevTools protocol

Nothing has to be installed but the browser, and websocket-client, which JupyterLab brings.
"""

import base64, itertools, json, shutil, subprocess, time, urllib.request
from pathlib import Path


def chromium():
    return shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


def wait_for(ask, what, seconds=120, every=0.1):
    "Return the first answer of `ask` that is true; an AssertionError says what did not come"
    end = time.monotonic() + seconds
    while not (got := ask()):
        assert time.monotonic() < end, f'{what} did not come in {seconds} seconds'
        time.sleep(every)
    return got


OPTIONS = (
    '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
    '--disable-component-update --disable-sync --remote-debugging-port=0 --remote-allow-origins=*'
).split()


class Browser:
    "One tab; `asked` holds every address that it wanted, `console` what the page logged there"

    def __init__(self, folder, width=1000, height=900):
        import websocket

        self.user = Path(folder) / 'user'
        self.asked = []
        self.console = []
        self.ids = itertools.count(1)
        own = [f'--window-size={width},{height}', f'--user-data-dir={self.user}']
        self.process = subprocess.Popen(
            [chromium(), *OPTIONS, *own, 'about:blank'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            port = wait_for(
                lambda: (f := self.user / 'DevToolsActivePort').exists() and f.read_text().split('\n')[0],
                "the browser's port",
            )
            tabs = wait_for(
                lambda: [
                    t for t in json.load(urllib.request.urlopen(f'http://127.0.0.1:{port}/json')) if t['type'] == 'page'
                ],
                'a tab',
            )
            self.socket = websocket.create_connection(tabs[0]['webSocketDebuggerUrl'], timeout=120)
            for name in ('Page', 'Runtime', 'Network', 'Log'):
                self.call(f'{name}.enable')
        except BaseException:
            self.close()
            raise

    def call(self, method, **params):
        "Send a command; return its result, after taking note of what happened meanwhile"
        i = next(self.ids)
        self.socket.send(json.dumps(dict(id=i, method=method, params=params)))
        while (got := json.loads(self.socket.recv())).get('id') != i:
            if got['method'] in ('Network.requestWillBeSent', 'Network.webSocketCreated'):
                self.asked.append(
                    got['params']['request']['url'] if 'request' in got['params'] else got['params']['url']
                )
            if got['method'] == 'Log.entryAdded':
                self.console.append(got['params']['entry']['text'])
        assert 'error' not in got, (method, got['error'])
        return got['result']

    def js(self, code):
        "Return what an expression is on the page"
        got = self.call('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in got, got['exceptionDetails']
        return got['result'].get('value')

    def open(self, url):
        self.call('Page.navigate', url=url)

    def find(self, css):
        return wait_for(lambda: self.js(f'!!document.querySelector({json.dumps(css)})'), css)

    def click(self, css):
        "Press the mouse in the middle of an element, as a person would"
        self.find(css)
        x, y = self.js(
            f'(() => {{ const e = document.querySelector({json.dumps(css)}); e.scrollIntoView({{block: "center"}}); '
            f'const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] }})()'
        )
        for kind in ('mousePressed', 'mouseReleased'):
            self.call('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1)

    def type(self, css, text):
        "Put a text in the place of what an input holds"
        self.click(css)
        self.js(f'document.querySelector({json.dumps(css)}).select()')
        self.call('Input.insertText', text=text)

    def picture(self, path):
        Path(path).write_bytes(base64.b64decode(self.call('Page.captureScreenshot')['data']))

    def close(self):
        if hasattr(self, 'socket'):
            self.socket.close()
        self.process.terminate()
        self.process.wait(timeout=30)
