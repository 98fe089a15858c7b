"""Reads what Grafana is given: the password, the data source, the dashboards with their queries.

Each request answers with one line per query of the dashboards: the number of series that
Prometheus returns, and the query.
"""

import http.server
import json
import os
import urllib.parse
import urllib.request
from pathlib import Path

import yaml

PROVISIONING = Path("/etc/grafana/provisioning")
PASSWORD = Path(os.environ["GF_SECURITY_ADMIN_PASSWORD__FILE"]).read_text()
((SOURCE,),) = [
    yaml.safe_load(path.read_text())["datasources"] for path in PROVISIONING.glob("datasources/*")
]
((PROVIDER,),) = [
    yaml.safe_load(path.read_text())["providers"] for path in PROVISIONING.glob("dashboards/*")
]
URL = os.path.expandvars(SOURCE["url"])


def series_of(query: str) -> int:
    asked = urllib.parse.urlencode({"query": query.replace("$__rate_interval", "1m")})
    with urllib.request.urlopen(f"{URL}/api/v1/query?{asked}", timeout=10) as answer:
        return len(json.load(answer)["data"]["result"])


class Queries(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        lines = [
            f"{series_of(target['expr'])} {target['expr']}\n"
            for path in Path(PROVIDER["options"]["path"]).glob("*.json")
            for panel in json.loads(path.read_text())["panels"]
            for target in panel.get("targets", ())
        ]
        self.send_response(200)
        self.end_headers()
        self.wfile.write("".join(lines).encode())


assert PASSWORD
http.server.ThreadingHTTPServer(("", 3000), Queries).serve_forever()
