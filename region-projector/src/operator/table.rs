//! Columns for a terminal.

/// Longest cell, in characters. What is longer is cut; `--json` has it whole.
const CELL_CHARS_MAX: usize = 80;

/// Rows under a header, each column as wide as its widest cell.
pub struct Table<const COLUMNS: usize> {
    rows: Vec<[String; COLUMNS]>,
}

impl<const COLUMNS: usize> Table<COLUMNS> {
    /// With its header.
    pub fn new(header: [&str; COLUMNS]) -> Self {
        Self { rows: vec![header.map(|title| title.to_uppercase())] }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: [&str; COLUMNS]) {
        self.rows.push(cells.map(cell));
    }

    /// The table, or one line when it has no rows.
    pub fn or(&self, nothing: &str) -> String {
        if self.rows.len() == 1 {
            return format!("{nothing}\n");
        }
        let width = |column: usize| self.rows.iter().map(move |row| row[column].chars().count());
        let widths: [usize; COLUMNS] =
            std::array::from_fn(|column| width(column).max().unwrap_or_default());
        let mut text = String::new();
        for row in &self.rows {
            let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
            text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
            text.push('\n');
        }
        text
    }
}

/// One line of printable characters, whatever an event's data hold.
fn cell(text: &str) -> String {
    let mut characters = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    let mut cell: String = characters.by_ref().take(CELL_CHARS_MAX).collect();
    if characters.next().is_some() {
        cell.push('…');
    }
    cell
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_cells_are_one_line() {
        let mut table = Table::new(["id", "data"]);
        assert_eq!(table.or("nothing"), "nothing\n");
        table.row(["order-1", "{\n}"]);
        table.row(["ö", &"x".repeat(100)]);
        let text = table.or("nothing");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "ID       DATA");
        assert_eq!(lines[1], "order-1  { }");
        assert_eq!(lines[2], format!("ö        {}…", "x".repeat(80)));
    }
}
