"""trimtab on Ray: several engines behind one address, or for one folder of prompts."""
