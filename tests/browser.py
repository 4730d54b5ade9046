"""A headless Chromium for the tests of pages. A test file takes the fixture `chromium` with
`pytest_plugins = ['browser']`, and marks its tests with `needs_chromium`."""

import shutil
from importlib.util import find_spec

import pytest

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
DRIVER = shutil.which('chromedriver')
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER and find_spec('selenium')),
    reason='needs selenium, of [dev], Chromium and its driver: apt-get install chromium-driver',
)
FLAGS = (
    '--headless',
    '--no-sandbox',  # which root cannot have
    '--disable-gpu',
    '--disable-dev-shm-usage',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
)


@pytest.fixture(scope='module')
def chromium(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f'--user-data-dir={tmp_path_factory.mktemp("chromium")}'):
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


def set_screen(browser, width, height, scheme='light'):
    """Give the pages of a browser a screen of this size in CSS pixels, and light or dark colors."""
    screen = {'width': width, 'height': height, 'deviceScaleFactor': 1, 'mobile': True}
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', screen)
    scheme = {'name': 'prefers-color-scheme', 'value': scheme}
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': [scheme]})


def severe_messages(browser):
    """What pages have written to the console as an error since the last call, but for the network's
    share."""
    said = [line for line in browser.get_log('browser') if line['level'] == 'SEVERE']
    return [line for line in said if line['source'] != 'network']
