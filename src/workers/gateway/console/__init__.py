"""The console: pages for the people who look after accounts and after the deployment.

Hides templates, sessions and forms. Invariants: pages are made here and need no script (one small file of ours refreshes
what is live); foreign text is escaped, always; whoever reads cannot act, whoever acts says why; what is asked for goes
through the core of the events under a key that its form carries, so that a form sent twice acts once; the questions that
pages answer are those of the operator's commands.
"""

from workers.gateway.console.routes import console_routes

__all__ = ["console_routes"]
