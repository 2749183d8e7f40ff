"""Matrix-free operators: Hessian, GGN and Fisher of a training objective."""
