"""The model repository: files on disk -> name and version -> engine."""

from conveyor_server.repository.prepare import Prepared
from conveyor_server.repository.repository import ModelVersion, Repository

__all__ = ["ModelVersion", "Prepared", "Repository"]
