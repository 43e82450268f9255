"""Records in, commands out: what each source makes of what it is sent."""
