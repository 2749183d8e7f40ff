"""What a page holds, read as its script reads it."""

import base64
import html
import json
import re

import numpy as np

CAPTION = r"<figcaption>(.*?)(?:<small>.*?)?</figcaption>"
CHART = re.compile(CAPTION + r".*?<script type=\"application/json\">(.*?)</script>", re.DOTALL)


def charts(path):
    """Panels of each chart, by its title; of several, those of the last."""
    return {html.unescape(title): panels(text) for title, text in CHART.findall(path.read_text())}


def panels(text):
    content = json.loads(text)
    arrays = [
        np.frombuffer(base64.b64decode(array["data"]), "<f4").reshape(array["shape"])
        for array in content["arrays"]
    ]

    def resolved(value):
        if isinstance(value, list):
            return [resolved(item) for item in value]
        if isinstance(value, dict):
            if "$" in value:
                return arrays[value["$"]]
            return {key: resolved(item) for key, item in value.items()}
        return value

    return resolved(content["panels"])


def tables(path):
    """Rows of cells of each table, by its title."""
    found = {}
    for table in re.findall(r"<table>(.*?)</table>", path.read_text(), re.DOTALL):
        caption = html.unescape(re.search(r"<caption>(.*?)</caption>", table)[1])
        rows = re.findall(r"<tr>(<td.*?)</tr>", table, re.DOTALL)
        found[caption] = [
            [
                html.unescape(re.sub("<.*?>", "", cell)).replace("\N{NO-BREAK SPACE}", " ")
                for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)
            ]
            for row in rows
        ]
    return found
