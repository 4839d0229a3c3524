"""A strict local stand-in for the chat-completions API of docs/api.md, as a separate process.

It shares nothing with the rest of batchrun but the errors, so that it can check it: the simulator's ledger is the truth
about what was served and billed.
"""

from batchrun.simulator.config import SimulatorConfig, config_from_json
from batchrun.simulator.faults import Fault, parse_faults
from batchrun.simulator.ledger import LedgerLine, question_of, read_ledger
from batchrun.simulator.limits import PlannedChange
from batchrun.simulator.process import run

__all__ = ["SimulatorConfig", "config_from_json", "run", "Fault", "PlannedChange", "parse_faults"]
__all__ += ["LedgerLine", "read_ledger", "question_of"]
