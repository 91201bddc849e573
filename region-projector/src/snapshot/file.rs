//! The file of a snapshot.
//!
//! | bytes | what |
//! |---|---|
//! | 18 | `TIDEMARK-SNAPSHOT` and a line break |
//! | 4 | the format, big-endian as every number here |
//! | 4 | bytes of the header |
//! | .. | the header, JSON |
//! | .. | zstd: for each table of the header its pieces, each with its bytes (4) before it, then a zero (4) and the number of its lines (8) |
//! | 32 | SHA-256 of all before |
//!
//! Lines are those of COPY's text format. Nothing of a file is used before its checksum is right.
//! Files are read and written in place: the commands that do so have nothing else to do meanwhile.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek as _, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::{Header, SnapshotError};

/// The format that is written, and the only one that is read.
pub const FORMAT: u32 = 1;
const MAGIC: &[u8; 18] = b"TIDEMARK-SNAPSHOT\n";
const PREAMBLE_BYTES: u64 = MAGIC.len() as u64 + 8;
const CHECKSUM_BYTES: u64 = 32;
const HEADER_BYTES_MAX: u32 = 1 << 20;
/// A piece is written once it has so many bytes.
const PIECE_BYTES: usize = 256 * 1024;
/// One line has less than this.
const PIECE_BYTES_MAX: u32 = 64 << 20;
const COMPRESSION_LEVEL: i32 = 3;

/// A file being written. It has its name once it is whole.
pub struct Writer {
    path: PathBuf,
    partial: PathBuf,
    encoder: zstd::Encoder<'static, Hashing>,
    piece: Vec<u8>,
    line_count: u64,
}

/// Writes and hashes.
struct Hashing {
    file: BufWriter<File>,
    hash: Sha256,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Writer {
    /// A file that must not be there yet.
    pub fn create(path: &Path, header: &Header) -> Result<Self, SnapshotError> {
        let failed = |source| SnapshotError::File { path: path.to_owned(), source };
        if path.exists() {
            return Err(failed(io::ErrorKind::AlreadyExists.into()));
        }
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        Self::begin(path, partial, header).map_err(failed)
    }

    fn begin(path: &Path, partial: PathBuf, header: &Header) -> io::Result<Self> {
        let file = BufWriter::new(File::create(&partial)?);
        let mut file = Hashing { file, hash: Sha256::new() };
        let header = serde_json::to_vec(header)?;
        let header_bytes = u32::try_from(header.len()).map_err(io::Error::other)?;
        file.write_all(MAGIC)?;
        file.write_all(&FORMAT.to_be_bytes())?;
        file.write_all(&header_bytes.to_be_bytes())?;
        file.write_all(&header)?;
        let encoder = zstd::Encoder::new(file, COMPRESSION_LEVEL)?;
        let path = path.to_owned();
        Ok(Self { path, partial, encoder, piece: Vec::new(), line_count: 0 })
    }

    /// More lines of the current table, each whole.
    pub fn lines(&mut self, lines: &[u8]) -> Result<(), SnapshotError> {
        self.line_count += count_lines(lines);
        self.piece.extend_from_slice(lines);
        if PIECE_BYTES <= self.piece.len() { self.flush_piece() } else { Ok(()) }
    }

    /// The current table has no more lines; what comes now is of the next one.
    pub fn end_table(&mut self) -> Result<(), SnapshotError> {
        self.flush_piece()?;
        let line_count = std::mem::take(&mut self.line_count).to_be_bytes();
        let end = [&0u32.to_be_bytes()[..], &line_count].concat();
        self.encoder.write_all(&end).map_err(|source| self.failed(source))
    }

    /// The file is whole.
    pub fn finish(self) -> Result<(), SnapshotError> {
        let Self { path, partial, encoder, .. } = self;
        let finish = || {
            let Hashing { mut file, hash } = encoder.finish()?;
            file.write_all(&hash.finalize())?;
            file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
            std::fs::rename(&partial, &path)
        };
        finish().map_err(|source| SnapshotError::File { path: path.clone(), source })
    }

    fn flush_piece(&mut self) -> Result<(), SnapshotError> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let piece = std::mem::take(&mut self.piece);
        let bytes = u32::try_from(piece.len()).unwrap_or(u32::MAX).to_be_bytes();
        let written = self.encoder.write_all(&bytes).and_then(|()| self.encoder.write_all(&piece));
        written.map_err(|source| self.failed(source))
    }

    fn failed(&self, source: io::Error) -> SnapshotError {
        SnapshotError::File { path: self.partial.clone(), source }
    }
}

/// A file whose checksum is right.
#[derive(Debug)]
pub struct Snapshot {
    /// What is in it.
    pub header: Header,
    path: PathBuf,
    body_begin: u64,
    body_bytes: u64,
}

/// What comes next in a file.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    /// Lines of the current table, each whole.
    Lines(Vec<u8>),
    /// The current table had so many lines.
    End(u64),
}

impl Snapshot {
    /// Reads all of it once, and believes nothing before that.
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        let failed = |source| SnapshotError::File { path: path.to_owned(), source };
        let mut file = BufReader::new(File::open(path).map_err(failed)?);
        let bytes = file.get_ref().metadata().map_err(failed)?.len();
        let mut preamble = [0; PREAMBLE_BYTES as usize];
        let read = read_up_to(&mut file, &mut preamble).map_err(failed)?;
        if !preamble[..read].starts_with(&MAGIC[..read.min(MAGIC.len())]) || read == 0 {
            return Err(SnapshotError::Foreign);
        }
        if bytes < PREAMBLE_BYTES + CHECKSUM_BYTES {
            return Err(SnapshotError::Damaged("it is cut"));
        }
        let number = |at: usize| {
            u32::from_be_bytes([preamble[at], preamble[at + 1], preamble[at + 2], preamble[at + 3]])
        };
        let (format, header_bytes) = (number(MAGIC.len()), number(MAGIC.len() + 4));
        if format != FORMAT {
            return Err(SnapshotError::UnknownFormat(format));
        }
        check(path, bytes - CHECKSUM_BYTES).map_err(failed)??;
        let body_begin = PREAMBLE_BYTES + u64::from(header_bytes);
        if HEADER_BYTES_MAX < header_bytes || bytes - CHECKSUM_BYTES < body_begin {
            return Err(SnapshotError::Damaged("its header is too long"));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header).map_err(failed)?;
        let header = serde_json::from_slice(&header)
            .map_err(|_| SnapshotError::Damaged("its header cannot be read"))?;
        let body_bytes = bytes - CHECKSUM_BYTES - body_begin;
        Ok(Self { header, path: path.to_owned(), body_begin, body_bytes })
    }

    /// Its lines, from the first table on.
    pub fn pieces(&self) -> Result<Pieces, SnapshotError> {
        let begin = || {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(self.body_begin))?;
            zstd::Decoder::new(file.take(self.body_bytes))
        };
        let decoder = begin();
        let failed = |source| SnapshotError::File { path: self.path.clone(), source };
        Ok(Pieces { decoder: decoder.map_err(failed)? })
    }

    /// How many lines each table has.
    pub fn line_counts(&self) -> Result<Vec<u64>, SnapshotError> {
        let mut pieces = self.pieces()?;
        let mut counts = Vec::new();
        while counts.len() < self.header.tables.len() {
            match pieces.next_piece()? {
                Piece::Lines(_) => {}
                Piece::End(count) => counts.push(count),
            }
        }
        Ok(counts)
    }
}

/// The lines of a file, one piece after the other.
pub struct Pieces {
    decoder: zstd::Decoder<'static, BufReader<io::Take<File>>>,
}

impl Pieces {
    /// The next one. There are as many ends as the header has tables.
    pub fn next_piece(&mut self) -> Result<Piece, SnapshotError> {
        self.read().map_err(|_| SnapshotError::Damaged("its lines cannot be read"))
    }

    fn read(&mut self) -> io::Result<Piece> {
        let mut number = [0; 4];
        self.decoder.read_exact(&mut number)?;
        let bytes = u32::from_be_bytes(number);
        if bytes == 0 {
            let mut count = [0; 8];
            self.decoder.read_exact(&mut count)?;
            return Ok(Piece::End(u64::from_be_bytes(count)));
        }
        if PIECE_BYTES_MAX < bytes {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut lines = vec![0; bytes as usize];
        self.decoder.read_exact(&mut lines)?;
        Ok(Piece::Lines(lines))
    }
}

/// Compares the checksum at the end with what comes before.
fn check(path: &Path, hashed_bytes: u64) -> io::Result<Result<(), SnapshotError>> {
    let mut file = BufReader::with_capacity(1 << 20, File::open(path)?);
    let mut hash = HashOf(Sha256::new());
    io::copy(&mut file.by_ref().take(hashed_bytes), &mut hash)?;
    let mut stored = [0; CHECKSUM_BYTES as usize];
    file.read_exact(&mut stored)?;
    let is_right = hash.0.finalize().as_slice() == stored;
    Ok(is_right.then_some(()).ok_or(SnapshotError::Damaged("its checksum is wrong")))
}

struct HashOf(Sha256);

impl Write for HashOf {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn read_up_to(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut read = 0;
    while read < buffer.len() {
        match file.read(&mut buffer[read..])? {
            0 => break,
            more => read += more,
        }
    }
    Ok(read)
}

/// In the text format a line break inside a value is escaped.
fn count_lines(lines: &[u8]) -> u64 {
    lines.iter().filter(|byte| **byte == b'\n').count() as u64
}
