//! Rows as the server's binary copy takes them: what it reads fastest, and nothing to be escaped.

/// The signature, no flags, and no extension of the header.
const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
const TRAILER: [u8; 2] = (-1_i16).to_be_bytes();

/// Rows that are gathered for one copy.
#[derive(Debug)]
pub struct CopyRows {
    bytes: Vec<u8>,
    count: usize,
}

impl Default for CopyRows {
    fn default() -> Self {
        Self { bytes: HEADER.to_vec(), count: 0 }
    }
}

impl CopyRows {
    /// Begins a row of so many columns, which are given one by one.
    pub fn row(&mut self, columns: i16) -> &mut Self {
        self.count += 1;
        self.bytes.extend(columns.to_be_bytes());
        self
    }

    /// A `text` or a `json`.
    pub fn text(&mut self, text: &str) -> &mut Self {
        self.field(text.as_bytes())
    }

    /// A `text`, or null.
    pub fn text_or_null(&mut self, text: Option<&str>) -> &mut Self {
        match text {
            Some(text) => self.text(text),
            None => {
                self.bytes.extend((-1_i32).to_be_bytes());
                self
            }
        }
    }

    /// An `integer`.
    pub fn integer(&mut self, value: i32) -> &mut Self {
        self.field(&value.to_be_bytes())
    }

    /// A `bigint`.
    pub fn bigint(&mut self, value: i64) -> &mut Self {
        self.field(&value.to_be_bytes())
    }

    /// Whether nothing is to be copied.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// All of it, as one copy takes it.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.extend(TRAILER);
        self.bytes
    }

    fn field(&mut self, bytes: &[u8]) -> &mut Self {
        // States and rows are bounded far below that.
        let length = i32::try_from(bytes.len()).unwrap_or(i32::MAX);
        self.bytes.extend(length.to_be_bytes());
        self.bytes.extend(bytes);
        self
    }
}
