"""Recipe -> plan (a DAG of steps named by content) -> execution."""
