"""The doctor finds what keeps a daemon from working, in folders, ports, peers and configuration, and what mends it."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from tests.daemons import Site, archive, daemon, site
from tests.peers import free_port


def findings(one: Site) -> dict[str, dict[str, str]]:
    document: dict[str, Any] = json.loads(one.run("doctor", "--json").stdout)
    return {finding["subject"]: finding for finding in document["findings"]}


def pacs(port: int, **more: Any) -> dict[str, Any]:
    place = {"host": "127.0.0.1", "port": port, "ae_title": "ARCHIVE", "calling_ae_title": "DINTS"}
    return {"kind": "dicom", "name": "pacs", "timeout_seconds": 2.0} | place | more


def test_a_site_in_order_has_only_good_findings_and_peers_are_asked(tmp_path: Path) -> None:
    with archive(tmp_path / "archive") as peer:
        one = site(tmp_path / "site")
        results = one.fields["destinations"][0]
        query = {"sender": "MR1", **{k: v for k, v in pacs(peer.port).items() if k not in ("kind", "name")}}
        one.configure(destinations=[results, pacs(peer.port)], completeness={"queries": [query]})
        found = findings(one)
    subjects = ("configuration appliance.toml", "route all", "data folder", "room for studies", f"port {one.port}",
                f"port {one.http_port}", "destination results", "destination pacs", "sender MR1")  # fmt: skip
    for subject in subjects:
        assert found[subject]["status"] == "ok", found[subject]
    assert found["destination pacs"]["found"] == "answers"
    assert not one.data_dir.exists()  # it only looks


def test_each_fault_is_named_with_what_mends_it(tmp_path: Path) -> None:
    one = site(tmp_path)
    one.data_dir.mkdir(mode=0o755)
    stow = {"kind": "stow", "name": "web", "url": f"http://127.0.0.1:{free_port()}/dicom-web"}
    one.configure(destinations=[*one.fields["destinations"], pacs(free_port()), stow], disk={"free_bytes": 1 << 60})
    with socket.socket() as other:
        other.bind(("127.0.0.1", one.port))
        other.listen()
        found = findings(one)
    assert "Address already in use" in found[f"port {one.port}"]["found"]
    for subject, fix in {
        f"port {one.port}": "ss -ltnp",
        "data folder": f"chmod 700 {one.data_dir}",
        "room for studies": "free some space",
        "destination pacs": "check host, port",
        "destination web": "check host, port",
    }.items():
        assert found[subject]["status"] == "problem", found[subject]
        assert fix in found[subject]["fix"]
    assert "[delivery-unreachable]" in found["destination pacs"]["found"]
    assert one.run("doctor").returncode == 1


def test_ports_of_the_running_daemon_are_its_own(tmp_path: Path) -> None:
    with daemon(tmp_path) as one:
        found = findings(one)
    assert found[f"port {one.port}"]["status"] == "ok"
    assert "the daemon runs" in found[f"port {one.port}"]["found"]


def test_unsound_configuration_is_one_finding_with_its_code(tmp_path: Path) -> None:
    one = site(tmp_path)
    one.config.chmod(0o666)
    found = findings(one)
    assert found["configuration appliance.toml"]["status"] == "problem"
    assert "[config-rights]" in found["configuration appliance.toml"]["found"]
    assert not any(subject.startswith(("port", "destination")) for subject in found)
