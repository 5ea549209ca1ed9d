"""The configuration of a run: one dataclass tree, validated once, saved with the run.

Values come from the defaults here, then a YAML recipe, then dotted overrides on the command line. Checks
of one field live in the part that owns it; checks across parts live in `RunConfig.validate`.
"""

from engine.config.architecture import ARCHITECTURES, Architecture, architecture_of
from engine.config.data import DataConfig, LabelledConfig, Objective
from engine.config.fault import FaultConfig, NonFinitePolicy, SpikePolicy
from engine.config.methods.adapter import AdapterConfig
from engine.config.methods.distil import DistilConfig
from engine.config.methods.prune import PruneConfig
from engine.config.methods.regularise import RegulariseConfig
from engine.config.model import DEFAULT_ARCHITECTURE, MODEL_SIZES, ModelConfig, sizes_of
from engine.config.optim import OptimConfig, ScheduleName
from engine.config.optimizer import OPTIMIZERS, optimizers_with_option
from engine.config.run import RunConfig, extra_sections, section_names
from engine.config.shape import Shape
from engine.config.task_entry import TaskEntry, Title
from engine.config.tasks import TASKS, task_choices, task_entries, tasks_with_field
from engine.config.train import MonitorConfig, Precision, TrainConfig, ZeroConfig
from engine.errors import require

__all__ = [
    "ARCHITECTURES",
    "DEFAULT_ARCHITECTURE",
    "MODEL_SIZES",
    "OPTIMIZERS",
    "TASKS",
    "AdapterConfig",
    "Architecture",
    "DataConfig",
    "DistilConfig",
    "FaultConfig",
    "LabelledConfig",
    "ModelConfig",
    "MonitorConfig",
    "NonFinitePolicy",
    "Objective",
    "OptimConfig",
    "Precision",
    "PruneConfig",
    "RegulariseConfig",
    "RunConfig",
    "ScheduleName",
    "Shape",
    "SpikePolicy",
    "TaskEntry",
    "Title",
    "TrainConfig",
    "ZeroConfig",
    "architecture_of",
    "extra_sections",
    "optimizers_with_option",
    "require",
    "section_names",
    "sizes_of",
    "task_choices",
    "task_entries",
    "tasks_with_field",
]
