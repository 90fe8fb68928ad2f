"""trimtab on Ray: several engines behind one address, or over one folder of prompts."""
