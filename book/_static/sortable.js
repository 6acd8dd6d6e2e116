// Sorts a table.sortable by the columns whose heads are marked data-sortable: by pressing a head, or, on a phone, where
// rows are cards without heads, by the select box above. Without JavaScript the table stays as it is.
(() => {
  const text = new Intl.Collator("en", { numeric: true });

  function key(row, column) {
    const cell = row.cells[column];
    return cell.dataset.sort ?? cell.textContent.trim();
  }

  function enhance(table) {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    const rows = [...body.rows]; // in the book's order, which stays among equals
    const select = document.createElement("select");

    function sort(column, sign) {
      const compare = (a, b) => sign * text.compare(key(a, column), key(b, column));
      body.append(...(column < 0 ? rows : [...rows].sort(compare)));
      heads.forEach((head) => head.removeAttribute("aria-sort"));
      if (column >= 0) heads[column].setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      select.value = column;
    }

    select.add(new Option("their order in the book", -1));
    heads.forEach((head, column) => {
      if (!("sortable" in head.dataset)) return;
      select.add(new Option(head.textContent, column));
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      button.addEventListener("click", () => sort(column, head.getAttribute("aria-sort") === "ascending" ? -1 : 1));
      head.append(button);
    });
    select.addEventListener("change", () => sort(Number(select.value), 1));

    const label = document.createElement("label");
    label.className = "sortable-by";
    label.append("Sort by ", select);
    table.before(label);
  }

  function start() {
    document.querySelectorAll("table.sortable").forEach(enhance);
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
