"""What is wrong with a data set, before anything is trained on it."""

from skinfast.audit.audit import Audit, audit
from skinfast.audit.page import write_audit

__all__ = ["Audit", "audit", "write_audit"]
