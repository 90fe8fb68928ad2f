"""What people do with trimtab: the command line, one file a verb."""
