"""Who paid for what, by every name that Stripe may use: found by name, however much a batch has loaded."""

from collections import defaultdict
from dataclasses import dataclass, field

from workers.ledger.model import Allocation, Payment, Purchase, Snapshot


@dataclass(slots=True)
class Linked:
    """Payments by their own name, their charge's and their invoice's; what was bought by the payment or the invoice that
    it names. Only ever grows: a link that is told stays.
    """

    _payments: dict[str, dict[str, Payment]] = field(default_factory=lambda: defaultdict(dict))
    _purchases: dict[str, dict[str, Purchase]] = field(default_factory=lambda: defaultdict(dict))
    _allocations: dict[str, dict[str, Allocation]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    @classmethod
    def of(cls, state: Snapshot) -> "Linked":
        """The links of all that was loaded."""
        linked = cls()
        for payment in state.payments.values():
            linked.add_payment(payment)
        for purchase in state.purchases.values():
            linked.add_purchase(purchase)
        for allocation in state.allocations.values():
            linked.add_allocation(allocation)
        return linked

    def add_payment(self, payment: Payment) -> None:
        """Know a payment by its names; again when it got another one."""
        for name in (payment.payment_id, payment.charge_id, payment.invoice_id):
            if name is not None:
                self._payments[name][payment.payment_id] = payment

    def add_purchase(self, purchase: Purchase) -> None:
        """Know a purchase by what paid for it."""
        for name in (purchase.payment_id, purchase.invoice_id):
            if name is not None:
                self._purchases[name][purchase.purchase_key] = purchase

    def add_allocation(self, allocation: Allocation) -> None:
        """Know months to come by what paid for them."""
        for name in (allocation.payment_id, allocation.invoice_id):
            if name is not None:
                self._allocations[name][allocation.allocation_key] = allocation

    def bought(self, payment: Payment) -> list[Purchase]:
        """What a payment paid for, in the order in which it was bought."""
        found = {
            purchase.purchase_key: purchase
            for name in self._names(payment)
            for purchase in self._purchases.get(name, {}).values()
        }
        return sorted(found.values(), key=Purchase.order)

    def months(self, payment: Payment) -> list[Allocation]:
        """The months to come that a payment paid for."""
        found = {
            allocation.allocation_key: allocation
            for name in self._names(payment)
            for allocation in self._allocations.get(name, {}).values()
        }
        return [found[key] for key in sorted(found)]

    def payers(self, bought: Purchase | Allocation) -> list[Payment]:
        """Every payment that paid for something, under whatever name, by id."""
        found: dict[str, Payment] = {}
        for name in (bought.payment_id, bought.invoice_id):
            for payment in self._payments.get(name, {}).values() if name else ():
                found |= {alias.payment_id: alias for alias in self._aliases(payment)}
        return [found[key] for key in sorted(found)]

    def _names(self, payment: Payment) -> list[str]:
        """What a purchase may name that this payment paid for: it or its charge or its intent, or the invoice."""
        names = {
            name
            for alias in self._aliases(payment)
            for name in (alias.payment_id, alias.charge_id, alias.invoice_id)
        }
        return sorted(name for name in names if name is not None)

    def _aliases(self, payment: Payment) -> list[Payment]:
        """The rows of one payment: told under its intent and under its charge it has two."""
        near = {
            **self._payments.get(payment.payment_id, {}),
            **(self._payments.get(payment.charge_id, {}) if payment.charge_id else {}),
        }
        return [
            other
            for other in near.values()
            if other is payment
            or other.payment_id == payment.charge_id
            or other.charge_id == payment.payment_id
        ]
