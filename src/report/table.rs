//! Tables for the terminal, for Markdown and for the HTML page.

/// To which side a column leans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// Rows of cells under a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    header: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table with the given columns.
    pub fn new(header: &[(&str, Align)]) -> Self {
        Self { header: header.iter().map(|(name, align)| ((*name).to_owned(), *align)).collect(), rows: Vec::new() }
    }

    /// Appends a row; missing cells are empty, superfluous ones dropped.
    pub fn row(&mut self, cells: &[String]) {
        let cell = |i: usize| cells.get(i).cloned().unwrap_or_default();
        self.rows.push((0..self.header.len()).map(cell).collect());
    }

    /// Aligned plain text, two spaces between columns, a rule under the header.
    pub fn text(&self) -> String {
        let widths = self.widths();
        let mut out = self.line(&self.names(), &widths, "  ");
        out.push_str(&"-".repeat(widths.iter().sum::<usize>() + 2 * widths.len().saturating_sub(1)));
        out.push('\n');
        for row in &self.rows {
            out.push_str(&self.line(row, &widths, "  "));
        }
        out
    }

    /// A Markdown table; bars within cells are escaped.
    pub fn markdown(&self) -> String {
        let escaped = Self {
            header: self.header.iter().map(|(name, align)| (name.replace('|', "\\|"), *align)).collect(),
            rows: self.rows.iter().map(|r| r.iter().map(|c| c.replace('|', "\\|")).collect()).collect(),
        };
        let widths: Vec<usize> = escaped.widths().iter().map(|w| (*w).max(3)).collect();
        let bar = |line: String| format!("| {} |\n", line.trim_end_matches('\n'));
        let mut out = bar(escaped.line(&escaped.names(), &widths, " | "));
        let rules: Vec<String> = widths
            .iter()
            .zip(&self.header)
            .map(|(&w, (_, align))| match align {
                Align::Left => "-".repeat(w),
                Align::Right => format!("{}:", "-".repeat(w - 1)),
            })
            .collect();
        out.push_str(&bar(rules.join(" | ")));
        for row in &escaped.rows {
            out.push_str(&bar(escaped.line(row, &widths, " | ")));
        }
        out
    }

    /// An HTML table, all text escaped.
    pub fn html(&self) -> String {
        let row = |tag: &str, cells: &[String]| {
            let cells: String = cells
                .iter()
                .zip(&self.header)
                .map(|(cell, (_, align))| {
                    let class = if *align == Align::Right { " class=\"num\"" } else { "" };
                    format!("<{tag}{class}>{}</{tag}>", escape(cell))
                })
                .collect();
            format!("<tr>{cells}</tr>")
        };
        let body: String = self.rows.iter().map(|r| row("td", r)).collect();
        format!("<table><thead>{}</thead><tbody>{body}</tbody></table>", row("th", &self.names()))
    }

    fn names(&self) -> Vec<String> {
        self.header.iter().map(|(name, _)| name.clone()).collect()
    }

    fn widths(&self) -> Vec<usize> {
        let widest = |i: usize| self.rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0);
        self.header.iter().enumerate().map(|(i, (name, _))| name.chars().count().max(widest(i))).collect()
    }

    fn line(&self, cells: &[String], widths: &[usize], gap: &str) -> String {
        let padded: Vec<String> = cells
            .iter()
            .zip(widths)
            .zip(&self.header)
            .map(|((cell, &width), (_, align))| match align {
                Align::Left => format!("{cell:<width$}"),
                Align::Right => format!("{cell:>width$}"),
            })
            .collect();
        let line = padded.join(gap);
        format!("{}\n", if gap.trim().is_empty() { line.trim_end() } else { &line })
    }
}

/// A whole number with its thousands set apart.
pub(super) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A positive quantity with about three significant digits.
pub(super) fn significant(value: f64) -> String {
    match value.abs() {
        v if !v.is_finite() => "–".to_owned(),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Text safe within HTML and SVG, in element content and in quoted attributes.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // Control characters are not allowed in a document at all.
            c if c.is_control() && c != '\n' && c != '\t' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}
