"""`python -m rlprior`."""

from rlprior.cli import main
from rlprior.world import end_process

end_process(main())
