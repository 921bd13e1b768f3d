import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import java.io.FileInputStream;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.GeneralSecurityException;
import java.time.Instant;
import java.time.temporal.ChronoUnit;
import java.util.HashMap;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;
import org.apache.arrow.flight.CallOption;
import org.apache.arrow.flight.FlightClient;
import org.apache.arrow.flight.FlightRuntimeException;
import org.apache.arrow.flight.FlightStream;
import org.apache.arrow.flight.Location;
import org.apache.arrow.flight.Ticket;
import org.apache.arrow.flight.auth2.BearerCredentialWriter;
import org.apache.arrow.flight.grpc.CredentialCallOption;
import org.apache.arrow.memory.ArrowBuf;
import org.apache.arrow.memory.RootAllocator;
import org.apache.arrow.vector.TimeStampNanoTZVector;
import org.apache.arrow.vector.VarCharVector;
import org.apache.arrow.vector.VectorSchemaRoot;

/**
 * Read the events of a ticket over Arrow Flight and count them.
 *
 * <pre>java -jar target/read-events.jar grpc://localhost:50051 'events:Order:now-1h:now:10000'
 * java -jar target/read-events.jar --ca ca.pem --token-file token grpc+tls://HOST:50051 'events:Order:now-1h:now:10000'</pre>
 *
 * The stream is read batch by batch, so any range fits into memory. Nothing is printed unless all of it arrived.
 */
public final class ReadEvents {
  private static final Set<String> OPTIONS = Set.of("--ca", "--token-file", "--cert", "--key");

  private final Map<String, Long> byType = new TreeMap<>();
  private long rows;
  private long withoutUser;
  private long dataBytes;
  private long firstNanos;
  private long lastNanos;

  public static void main(String[] arguments) throws Exception {
    Map<String, String> files = new HashMap<>();
    int at = 0;
    for (; at + 2 < arguments.length && OPTIONS.contains(arguments[at]); at += 2) {
      files.put(arguments[at], arguments[at + 1]);
    }
    if (arguments.length - at != 2 || files.containsKey("--cert") != files.containsKey("--key")) {
      System.err.println("usage: read-events [--ca FILE] [--token-file FILE] [--cert FILE --key FILE] URL TICKET");
      System.exit(2);
    }
    ReadEvents events = new ReadEvents();
    try {
      events.read(new Location(arguments[at]), arguments[at + 1], files);
    } catch (FlightRuntimeException refused) {
      System.err.println(reason(refused));
      System.exit(1);
    } catch (IOException | IllegalArgumentException | IllegalStateException wrong) { // a file, the URL, the receipt
      System.err.println(wrong instanceof IOException ? wrong : wrong.getMessage());
      System.exit(1);
    }
    events.print();
  }

  /** The sentence of the server; where there was no connection, why: gRPC itself says "io exception" of every certificate. */
  private static Object reason(FlightRuntimeException refused) {
    Throwable first = refused;
    while (first.getCause() != null) {
      first = first.getCause();
    }
    return first instanceof IOException || first instanceof GeneralSecurityException ? first : refused.getMessage();
  }

  /** A client of a grpc:// or a grpc+tls:// server. Of the files, those may be missing that the server does not ask for. */
  private static FlightClient connect(RootAllocator memory, Location server, Map<String, String> files) throws Exception {
    FlightClient.Builder builder = FlightClient.builder(memory, server);
    if (files.containsKey("--ca")) {
      builder.trustedCertificates(new FileInputStream(files.get("--ca")));
    }
    if (files.containsKey("--cert")) {
      builder.clientCertificate(new FileInputStream(files.get("--cert")), new FileInputStream(files.get("--key")));
    }
    return builder.build();
  }

  private static CallOption[] headers(Map<String, String> files) throws Exception {
    if (!files.containsKey("--token-file")) {
      return new CallOption[0];
    }
    String token = Files.readString(Path.of(files.get("--token-file"))).strip();
    return new CallOption[] {new CredentialCallOption(new BearerCredentialWriter(token))};
  }

  private void read(Location server, String ticket, Map<String, String> files) throws Exception {
    try (RootAllocator memory = new RootAllocator();
        FlightClient client = connect(memory, server, files);
        FlightStream stream = client.getStream(new Ticket(ticket.getBytes(StandardCharsets.UTF_8)), headers(files))) {
      // One root for the whole stream: every next() fills it with the next batch.
      VectorSchemaRoot batch = stream.getRoot();
      byte[] receipt = {};
      while (stream.next()) {
        add(batch);
        ArrowBuf metadata = stream.getLatestMetadata();
        if (metadata != null) {
          receipt = new byte[(int) metadata.readableBytes()];
          metadata.getBytes(metadata.readerIndex(), receipt);
        }
      }
      JsonNode said = new ObjectMapper().readTree(receipt).get("rows");
      if (said == null || said.asLong() != rows) {
        throw new IllegalStateException("the stream does not match its receipt after " + rows + " events; read it again");
      }
    }
  }

  private void add(VectorSchemaRoot batch) {
    int count = batch.getRowCount();
    if (count == 0) {
      return;
    }
    VarCharVector types = (VarCharVector) batch.getVector("entity_type");
    VarCharVector data = (VarCharVector) batch.getVector("data");
    TimeStampNanoTZVector timestamps = (TimeStampNanoTZVector) batch.getVector("timestamp");
    for (int row = 0; row < count; row++) {
      byType.merge(types.getObject(row).toString(), 1L, Long::sum);
      dataBytes += data.getValueLength(row);
    }
    withoutUser += batch.getVector("user_id").getNullCount();
    // Events come in the order of their timestamps.
    if (rows == 0) {
      firstNanos = timestamps.get(0);
    }
    lastNanos = timestamps.get(count - 1);
    rows += count;
  }

  private void print() {
    System.out.printf("rows=%d%nwithout_user=%d%ndata_bytes=%d%n", rows, withoutUser, dataBytes);
    if (rows > 0) {
      System.out.printf("first=%s%nlast=%s%n", second(firstNanos), second(lastNanos));
    }
    byType.forEach((type, count) -> System.out.printf("%s=%d%n", type, count));
  }

  private static Instant second(long nanos) {
    return Instant.EPOCH.plusNanos(nanos).truncatedTo(ChronoUnit.SECONDS);
  }
}
