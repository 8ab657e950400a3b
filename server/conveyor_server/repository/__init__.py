"""The model repository: files on disk -> name and version -> engine."""

from conveyor_server.repository.folder import Look
from conveyor_server.repository.policy import BatchPolicy, Overrides
from conveyor_server.repository.prepare import Prepared
from conveyor_server.repository.repository import ModelVersion, Repository

__all__ = ["BatchPolicy", "Look", "ModelVersion", "Overrides", "Prepared", "Repository"]
