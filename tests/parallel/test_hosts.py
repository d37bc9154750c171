"""What several hosts agree on, in two processes."""

import sys

import many_hosts
import numpy as np

from diffjax.parallel import hosts

SCRIPT = """
import os, sys, time
import numpy as np
from diffjax.parallel import devices, hosts
from diffjax.utils.errors import UserError

def refuse():
    raise UserError("no")

devices.start()
me, said = hosts.index(), []
said.append(hosts.first(lambda: {"from": me}))
said.append(hosts.in_turn(lambda: said.append("turn") or me))
said.append([hosts.everywhere(True), hosts.everywhere(me == 0)])
said.append(hosts.total(np.arange(3, dtype=np.uint8) + me).tolist())
vote = hosts.Vote()
said.append([vote.ask(me == 1 and step == 2) for step in range(7)])
try:
    hosts.first(lambda: [][0] if me else refuse())
except UserError as error:
    said.append(str(error))
hosts.say("the first")
print(said)
time.sleep(0.5 * me)
hosts.leave()
"""


def test_two_hosts_agree(tmp_path):
    processes = many_hosts.run(2, [sys.executable, "-c", SCRIPT], DIFFJAX_HOME=str(tmp_path))
    outs = [out.splitlines() for out, _ in many_hosts.finish(processes)]
    asked = [False, False, False, False, True, False, False]
    agreed = [[True, False], [1, 3, 5], asked, "no"]
    assert outs[0][-2:] == ["the first", str([{"from": 0}, "turn", 0, *agreed])]
    assert outs[1][-1] == str([{"from": 0}, "turn", 1, *agreed]) and "the first" not in outs[1]


def test_one_host_asks_nobody():
    assert hosts.first(lambda: "a") == hosts.in_turn(lambda: "a") == "a"
    assert hosts.everywhere(True) and not hosts.everywhere(False)
    assert hosts.Vote().ask(True) and hosts.total(np.ones(2)).tolist() == [1, 1]
    hosts.leave()
