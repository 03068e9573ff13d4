"""What stands between this machine and a server that runs well: each fact, and what to do about it.

Checks only look; nothing is started or changed.
"""

from service.doctor.checks import examine
from service.doctor.finding import Finding, Level

__all__ = ["Finding", "Level", "examine"]
