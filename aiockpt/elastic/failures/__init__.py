"""How children fail: error files, causes, who is to blame, and the report."""
