"""What people see of a run and how they tell that it is well: status, page, metrics, doctor."""
