"""The widgets in a real JupyterLab in headless Chromium: a slider is dragged, a cell is clicked, and the pictures must
change."""
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

root = Path(__file__).parents[1]
browser = next(filter(None,
                      map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'))),
                      None)
driver = shutil.which('chromedriver')
pytestmark = pytest.mark.skipif(not (browser and driver),
                                reason="no Chromium and chromedriver on the PATH: `apt-get install chromium "
                                       "chromium-driver`, or run .ci/run as root")
patience = 90 # Seconds for anything to appear

cells = ["""
from dropclass.analysis.context import HARBOUR, harbour, train_harbour
from dropclass.analysis.widgets import colocation_explorer, drop_explorer, schedule_explorer
habit,batches = train_harbour(steps=60),[harbour(6, seed=100)]
print('the network', 'is ready')
""", "drop_explorer(habit, batches, HARBOUR, start='boat')", "schedule_explorer(HARBOUR.names)",
"colocation_explorer(habit, batches, HARBOUR)"]


def wait(condition, what, seconds=patience):
    "Ask until there is an answer that counts as true."
    end = time.monotonic()+seconds
    while time.monotonic()<end:
        found = condition()
        if found: return found
        time.sleep(.3)
    raise AssertionError(f'after {seconds} seconds: no {what}')


def answers(url):
    "Whether a page can be fetched."
    try: return urlopen(url, timeout=5).status==200
    except (URLError, OSError): return False


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "Address of a JupyterLab on this machine, in a folder with one notebook; it knows no settings but its own."
    home,work,token = tmp_path_factory.mktemp('home'),tmp_path_factory.mktemp('work'),secrets.token_hex(16)
    nb = dict(cells=[dict(cell_type='code', id=f'cell-{i}', metadata={}, source=o.strip(), outputs=[],
                          execution_count=None) for i,o in enumerate(cells)],
              metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')), nbformat=4,
              nbformat_minor=5)
    (work/'widgets.ipynb').write_text(json.dumps(nb))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {**os.environ, 'HOME':str(home), 'PYTHONPATH':os.pathsep.join([str(root), os.environ['PYTHONPATH']]),
           'OMP_NUM_THREADS':'1', 'PYTHONWARNINGS':'ignore', 'IPYTHONDIR':str(home/'ipython'),
           **{f'JUPYTER_{o}_DIR':str(home/o.lower()) for o in ('CONFIG','DATA','RUNTIME')}}
    env.pop('MPLBACKEND', None)
    flags = ['--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0',
             f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={work}',
             '--expose-app-in-browser',
             '--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate']
    with open(home/'log', 'w') as log:
        server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', *flags], env=env, cwd=work, stdout=log,
                                  stderr=subprocess.STDOUT)
    try:
        wait(lambda: answers(f'http://127.0.0.1:{port}/api?token={token}') or server.poll() is not None, 'JupyterLab')
        assert server.poll() is None, (home/'log').read_text()
        yield f'http://127.0.0.1:{port}/lab/tree/widgets.ipynb?reset&token={token}'
    finally:
        server.terminate() # It ends its kernels
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()


@pytest.fixture(scope='module')
def page(lab, tmp_path_factory):
    "A browser in which all cells of the notebook have run."
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for o in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu',
              '--disable-background-networking', '--no-first-run', '--window-size=1300,2600',
              f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(o)
    page = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        page.set_script_timeout(patience)
        page.get(lab)
        ready = ("const w = window.jupyterapp?.shell?.currentWidget; "
                 "return !!w?.content?.widgets && w.sessionContext?.session?.kernel?.status==='idle'")
        wait(lambda: page.execute_script(ready), 'notebook with a kernel')
        page.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        wait(lambda: 'the network is ready' in text(page, 0) or 'Error' in text(page, 0), 'output of the first cell')
        assert 'Error' not in text(page, 0), text(page, 0)
        wait(lambda: len(pictures(page))>=2 and page.find_elements('css selector', '.widget-gridbox button'), 'widgets')
        yield page
    finally: page.quit()


def cell(page, i):
    "A cell of the notebook."
    return page.find_elements('css selector', '.jp-Notebook .jp-CodeCell')[i]


def text(page, i):
    "What a cell has put out, as text."
    return cell(page, i).find_element('css selector', '.jp-Cell-outputArea').text


def pictures(page):
    "Every widget's picture that is on the screen, as its pixels in base64."
    return page.execute_script("""
        const seen = o => o.complete && o.naturalWidth && o.offsetWidth;
        return [...document.querySelectorAll('img.widget-image')].filter(seen).map(o => {
            const c = document.createElement('canvas'); c.width = o.naturalWidth; c.height = o.naturalHeight;
            c.getContext('2d').drawImage(o, 0, 0); return c.toDataURL()})""")


def picture_of(page, i):
    "The one picture of a cell, or None."
    count = lambda j: len([o for o in cell(page, j).find_elements('css selector', 'img.widget-image')
                           if o.is_displayed()])
    found = pictures(page)
    at = sum(count(j) for j in range(i))
    return found[at] if count(i) and at<len(found) else None


def drag(page, handle, dx):
    "Drag the handle of a slider."
    from selenium.webdriver import ActionChains
    page.execute_script("arguments[0].scrollIntoView({block:'center'})", handle)
    ActionChains(page).drag_and_drop_by_offset(handle, dx, 0).perform()


def save(page, i, name):
    """Keep a picture of a cell's widget, sliders and all, where somebody asked for it: those of the tutorial are made
    so."""
    folder = os.environ.get('DROPCLASS_SCREENSHOTS')
    if not folder: return
    widget = cell(page, i).find_element('css selector', '.jp-Cell-outputArea .jupyter-widgets')
    page.execute_script("arguments[0].scrollIntoView({block:'start'})", widget)
    widget.screenshot(str(Path(folder)/f'{name}.png'))


def test_drop_explorer_follows_its_slider(page):
    "Dragging the slider back to zero changes picture and sentence: nothing is dropped any more."
    before,handles = picture_of(page, 1),cell(page, 1).find_elements('css selector', '.noUi-handle')
    assert before and 'changed between other classes' in text(page, 1)
    drag(page, handles[1], -400)
    wait(lambda: '; 0 pixels changed' in text(page, 1), 'sentence about nothing dropped')
    after = wait(lambda: (o := picture_of(page, 1)) and o!=before and o, 'new picture')
    drag(page, handles[0], 80) # Another image
    wait(lambda: 'boat: 0 pixels' not in text(page, 1), 'image in which the boat is found')
    other = wait(lambda: (o := picture_of(page, 1)) and o not in (before, after) and o, 'picture of another image')
    drag(page, handles[1], 400)
    wait(lambda: (o := picture_of(page, 1)) and o!=other, 'picture of the other image without the class')
    save(page, 1, 'drop_explorer')


def test_schedule_explorer_follows_its_slider(page):
    "A longer fit is a longer plan."
    before = picture_of(page, 2)
    assert '200 steps' in text(page, 2)
    drag(page, cell(page, 2).find_elements('css selector', '.noUi-handle')[0], 30)
    wait(lambda: '200 steps' not in text(page, 2) and 'steps, ' in text(page, 2), 'sentence about more steps')
    wait(lambda: (o := picture_of(page, 2)) and o!=before, 'new picture')
    save(page, 2, 'schedule_explorer')


def test_click_shows_the_images_behind_a_cell(page):
    "Before the click there is no picture; after it there are the images of that cell, and another cell has others."
    grid = cell(page, 3)
    assert picture_of(page, 3) is None and 'Click a cell' in text(page, 3)
    grid.find_element('css selector', 'button[title="water erased, boat looked at"]').click()
    wait(lambda: 'water erased: the IoU of boat goes from' in text(page, 3), 'sentence about the cell')
    first = wait(lambda: picture_of(page, 3), 'images')
    save(page, 3, 'colocation_explorer')
    grid.find_element('css selector', 'button[title="road erased, car looked at"]').click()
    wait(lambda: (o := picture_of(page, 3)) and o!=first, 'other images')


def test_no_cell_failed(page):
    "Nothing on the page is an error, and no widget is missing."
    assert not page.find_elements('css selector',
                                  '[data-mime-type="application/vnd.jupyter.error"], '
                                  '[data-mime-type="application/vnd.jupyter.stderr"]')
    assert 'Error displaying widget' not in page.find_element('css selector', 'body').text
