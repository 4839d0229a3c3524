"""A bill as a workbook (XLSX). Sole importer of xlsxwriter, from the extra `report`."""

import io
from collections.abc import Sequence
from decimal import Decimal

from batchrun.errors import JobError
from batchrun.report.bill import Bill
from batchrun.report.figures import figure, kind

MISSING = "needs another package: pip install 'batchrun[report]'"

_FORMS = {"usd": "#,##0.000000", "share": "0.0%", "seconds": "#,##0.00", "ratio": "0.000", "count": "#,##0"}


def workbook(bill: Bill, columns: Sequence[str], remarks: Sequence[str]) -> bytes:
    """Three sheets: figures as numbers that can be added; the same with money as text; and what the figures do not
    cover.

    Raises:
        JobError: xlsxwriter is not installed.
    """
    try:
        import xlsxwriter
    except ImportError as error:
        raise JobError(f"--format xlsx {MISSING}") from error
    content = io.BytesIO()
    safe = {"strings_to_formulas": False, "strings_to_urls": False, "strings_to_numbers": False}
    with xlsxwriter.Workbook(content, {"in_memory": True, **safe}) as book:
        head = book.add_format({"bold": True, "bottom": 1, "text_wrap": True})
        forms = {name: book.add_format({"num_format": form}) for name, form in _FORMS.items()}
        for title, as_text in (("bill", False), ("exact", True)):  # a number in a cell has only 15 digits
            sheet = book.add_worksheet(title)
            sheet.freeze_panes(1, len(bill.by))
            sheet.set_column(0, len(bill.by) - 1, 22)
            sheet.set_column(len(bill.by), len(bill.by) + len(columns), 14)
            sheet.write_row(0, 0, [*bill.by, *columns], head)
            sum_of = ("total", *[""] * (len(bill.by) - 1))
            for number, (group, line) in enumerate(
                [*((one.group, one) for one in bill.lines), (sum_of, bill.total)], 1
            ):
                for place, text in enumerate(group):
                    sheet.write_string(number, place, text)
                for place, name in enumerate(columns, len(bill.by)):
                    value = figure(line, name)
                    if isinstance(value, Decimal) and as_text:
                        sheet.write_string(number, place, f"{value:f}")
                    elif value is not None:
                        sheet.write_number(number, place, float(value), forms[kind(name)])
            sheet.autofilter(0, 0, len(bill.lines), len(bill.by) + len(columns) - 1)
        sheet = book.add_worksheet("beyond the figures")
        sheet.set_column(0, 0, 120)
        for number, remark in enumerate(remarks):
            sheet.write_string(number, 0, remark)
    return content.getvalue()
