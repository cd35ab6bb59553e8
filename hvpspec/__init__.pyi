__version__: str

from .curvature import HessianOperator as HessianOperator
from .curvature import Loss as Loss
from .curvature import structural_upper_bound as structural_upper_bound
from .errors import ComputationError as ComputationError
from .errors import DataChangedError as DataChangedError
from .errors import HvpspecError as HvpspecError
from .errors import InputError as InputError
from .errors import NonFiniteError as NonFiniteError
from .errors import NotDifferentiableError as NotDifferentiableError
from .linalg import DenseOperator as DenseOperator
from .linalg import FunctionOperator as FunctionOperator
from .linalg import Inertia as Inertia
from .linalg import SymmetricOperator as SymmetricOperator
from .linalg import eigvalsh as eigvalsh
from .linalg import inertia as inertia
from .spectrum import IndexCurve as IndexCurve
from .spectrum import IndexResult as IndexResult
from .spectrum import index as index
