"""What was measured as something to read: a view of plain records, and that as a page or Markdown."""
