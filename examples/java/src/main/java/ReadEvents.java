import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import java.nio.charset.StandardCharsets;
import java.time.Instant;
import java.time.temporal.ChronoUnit;
import java.util.Map;
import java.util.TreeMap;
import org.apache.arrow.flight.FlightClient;
import org.apache.arrow.flight.FlightRuntimeException;
import org.apache.arrow.flight.FlightStream;
import org.apache.arrow.flight.Location;
import org.apache.arrow.flight.Ticket;
import org.apache.arrow.memory.ArrowBuf;
import org.apache.arrow.memory.RootAllocator;
import org.apache.arrow.vector.TimeStampNanoTZVector;
import org.apache.arrow.vector.VarCharVector;
import org.apache.arrow.vector.VectorSchemaRoot;

/**
 * Read the events of a ticket over Arrow Flight and count them.
 *
 * <pre>java -jar target/read-events.jar grpc://localhost:50051 'events:Order:now-1h:now:10000'</pre>
 *
 * The stream is read batch by batch, so any range fits into memory. Nothing is printed unless all of it arrived.
 */
public final class ReadEvents {
  private final Map<String, Long> byType = new TreeMap<>();
  private long rows;
  private long withoutUser;
  private long dataBytes;
  private long firstNanos;
  private long lastNanos;

  public static void main(String[] arguments) throws Exception {
    if (arguments.length != 2) {
      System.err.println("usage: read-events grpc://host:port TICKET");
      System.exit(2);
    }
    ReadEvents events = new ReadEvents();
    try {
      events.read(new Location(arguments[0]), arguments[1]);
    } catch (FlightRuntimeException | IllegalStateException refused) {
      System.err.println(refused.getMessage());
      System.exit(1);
    }
    events.print();
  }

  private void read(Location server, String ticket) throws Exception {
    try (RootAllocator memory = new RootAllocator();
        FlightClient client = FlightClient.builder(memory, server).build();
        FlightStream stream = client.getStream(new Ticket(ticket.getBytes(StandardCharsets.UTF_8)))) {
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
