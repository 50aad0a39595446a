"""Everything hf_sparse raises on purpose.

HfSparseError
├── ConfigError       a SparseConfig argument, or a combination of them, can't work  (ValueError)
├── RegistrationError a method, format or kernel can't be registered as it is        (ValueError)
├── TargetError       a regex matches nothing, or something that can't be pruned     (ValueError)
├── CalibrationError  the calibration data, or what came of them, are unusable       (ValueError)
├── EvaluationError   a model can't be measured the way that was asked for           (ValueError)
├── AdapterError      a PEFT adapter can't be merged into a sparse model             (ValueError)
├── TrainingError     a model can't be trained as asked for, or its pattern broke    (ValueError)
├── SolveError        the maths failed for a layer: NaN weights, a bad Hessian  (ArithmeticError)
├── FormatError       tensors do not fit a storage format                            (ValueError)
│   └── CheckpointError   ... and were read from a file; names the file and the tensor
├── PackageError      an optional package is needed, and isn't installed            (ImportError)
├── ProcessError     one of several processes failed or is gone                   (RuntimeError)
├── SaveError         a checkpoint could not be written                                 (OSError)
└── HubError          the Hub refused a push, or can't be reached                       (OSError)

Each message names what was passed, what was expected and what to do about it. What of it comes from
files is shown, whatever it is: no character in it does anything to a terminal or a log.
"""

from .untrusted_text import printable


class HfSparseError(Exception):
    """Base class of every error of this package."""

    def __str__(self) -> str:
        return printable(super().__str__(), keep="\n")


class ConfigError(HfSparseError, ValueError):
    """An argument of `SparseConfig` is wrong, or contradicts another one."""


class RegistrationError(HfSparseError, ValueError):
    """A method, format or kernel of one's own is incomplete, or its name is taken."""


class TargetError(HfSparseError, ValueError):
    """A name or regex selects no layer, or one that can't be pruned."""


class CalibrationError(HfSparseError, ValueError):
    """Calibration data are missing, too short or don't suit the model."""


class EvaluationError(HfSparseError, ValueError):
    """A measurement can't be made: of this model, with these arguments or packages."""


class AdapterError(HfSparseError, ValueError):
    """An adapter can't be merged into a sparse model, or not the way that was asked for."""


class TrainingError(HfSparseError, ValueError):
    """A model can't be trained the way that was asked for, or training broke its pattern."""


class SolveError(HfSparseError, ArithmeticError):
    """A layer can't be solved: its weights, inputs or Hessian are not usable."""


class FormatError(HfSparseError, ValueError):
    """Tensors don't fit the storage format that they claim to have."""


class CheckpointError(FormatError):
    """A checkpoint on disk is damaged, incomplete, or of an unknown version."""


class PackageError(HfSparseError, ImportError):
    """Something needs an optional package that isn't installed; the message names the extra."""


class ProcessError(HfSparseError, RuntimeError):
    """One of the processes that prune together failed, is gone, or prunes something else."""


class SaveError(HfSparseError, OSError):
    """A checkpoint could not be written; says whether what was there before is untouched."""


class HubError(HfSparseError, OSError):
    """A push to the Hub was refused or broke off; its cause is huggingface_hub's own error."""
